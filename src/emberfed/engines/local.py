"""The default engine: one process, one client after the other, one base model in memory.

What clients do in idle time runs in a thread of its own, beside the server's aggregation and evaluation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from threading import Event
from typing import Any, final

from emberfed.engine import Clients, Engine, IdleTime, Recipe
from emberfed.records import ClientFailed, Question, Reply
from emberfed.sections import Section


class LocalConfig(Section):
    """The local engine has no options."""


@final
class LocalEngine(Engine):
    """Asks clients here, in the order of the questions."""

    Config = LocalConfig

    def __init__(self, config: Any, clients: Clients, recipe: Recipe | None = None) -> None:
        """Begin with nothing under way."""
        super().__init__(config, clients, recipe)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="idle clients")
        self._under_way: Future[float] | None = None
        self._closing = Event()
        self._idle = IdleTime()

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask one client after the other, then let them all go on."""
        self._wait()
        answered = []
        for question in questions:
            yield self.clients.answer(question)
            answered.append(replace(question, download=b""))  # idle work needs none, and they are large
        if answered:
            self._under_way = self._thread.submit(self._go_on, answered)

    def take_idle(self) -> IdleTime:
        """Return the sums since the last call."""
        idle, self._idle = self._idle, IdleTime()
        return idle

    def close(self) -> None:
        """End the thread, once the client that is at work is done; what others would do is done when it is needed."""
        self._closing.set()
        try:
            self._wait()
        finally:
            self._thread.shutdown()

    def _go_on(self, answered: Sequence[Question]) -> float:
        return math.fsum(self.clients.idle(question) for question in answered if not self._closing.is_set())

    def _wait(self) -> None:
        """Wait until no client is at work, and raise what stopped one."""
        if self._under_way is None:
            return
        started = time.perf_counter()
        under_way, self._under_way = self._under_way, None
        work_seconds = under_way.result()
        waited_seconds = time.perf_counter() - started
        self._idle = IdleTime(
            self._idle.work_seconds + work_seconds, self._idle.waited_seconds + min(waited_seconds, work_seconds)
        )
