"""Several processes of this machine, or one for each of its GPUs: clients train at the same time.

Every process has all clients' data and a base model of its own, whose frozen weights lie in memory once for all
processes (`models.shared_weights`). Each computes with as many threads as the server would, so the bits are the local
engine's. What a client keeps is on disk, so any process can go on as any client.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from queue import LifoQueue
from threading import Lock
from typing import IO, Annotated, Any, Literal, Self, final

import torch
from pydantic import Field, model_validator

from emberfed.engine import Clients, Engine, IdleTime, Recipe
from emberfed.errors import EngineError, StorageError
from emberfed.processes import ClientsProcess, Movable, ProcessDied, Seat, Sharing
from emberfed.records import ClientFailed, Question, Reply
from emberfed.sections import Section

_PROCESSES = 2
_QUESTIONS_PER_PROCESS = 2
"""One that it answers, and one that it can begin at once when the server is busy with what it answered."""

_Device = Annotated[str, Field(pattern=r"^(cpu|cuda:\d+)$")]


class PoolConfig(Section):
    """How many processes, and where.

    On CPUs each computes with `model.threads` threads, as the local engine would; set that to cores / processes, or
    they stand in each other's way. (Left out, it is torch's choice: usually all cores for each process.)

    Attributes:
        processes: How many; null: 2, or one for each of `devices`.
        devices: What each of them computes on: `cuda:0`, `cuda:1`, ..., or `cpu`; one named twice gets two processes.
            null: what `model.device` says, the same for all.
    """

    processes: int | None = Field(None, ge=1, le=1024)
    devices: list[_Device] | None = Field(None, min_length=1, max_length=1024)

    @model_validator(mode="after")
    def _one_process_for_a_device(self) -> Self:
        if self.devices is not None and self.processes not in (None, len(self.devices)):
            raise ValueError(
                f"processes is {self.processes}, but devices names {len(self.devices)}; there is one process for "
                f"each, so leave processes out"
            )
        return self

    @property
    def places(self) -> list[str | None]:
        """The device of each process; None is what `model.device` says."""
        return [*self.devices] if self.devices is not None else [None] * (self.processes or _PROCESSES)


@final
class PoolEngine(Engine):
    """Asks whichever process is free."""

    Config = PoolConfig

    def __init__(self, config: Any, clients: Clients, recipe: Recipe | None = None) -> None:
        """Start nothing yet: processes begin when there are questions for them."""
        super().__init__(config, clients, recipe)
        self._threads = ThreadPoolExecutor(len(config.places), thread_name_prefix="pool")
        self._seats: list[Seat] = []
        self._free: LifoQueue[Seat] = LifoQueue()
        self._weights = ExitStack()
        self._asked: dict[Future[Reply | ClientFailed], Question] = {}
        self._under_way: list[Future[float]] = []
        self._idle = IdleTime()

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask processes as they become free; then let all clients go on in them.

        Raises: EmberfedError if a process cannot start, or finds the disk full.
        """
        self._wait()
        answered = []
        try:
            for question in questions:
                if not self._seats:
                    self._open()
                while len(self._asked) >= _QUESTIONS_PER_PROCESS * len(self._seats) or self._is_asked(question.client):
                    yield from self._arrived()
                self._asked[self._threads.submit(self._answer, question)] = question
                answered.append(replace(question, download=b""))  # idle work needs none, and they are large
            while self._asked:
                yield from self._arrived()
        finally:
            for future in self._asked:  # whoever asked has given up
                future.cancel()
        self._under_way = [self._threads.submit(self._go_on, question) for question in answered]

    def take_idle(self) -> IdleTime:
        """Return the sums since the last call: seconds of work in all processes, and those waited for them."""
        idle, self._idle = self._idle, IdleTime()
        return idle

    def close(self) -> None:
        """End the processes, whatever they are doing; idle work that was cut short is done when it is needed."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for seat in self._seats:
            seat.end()
        for seat in self._seats:
            seat.wait()
        self._threads.shutdown()
        self._weights.close()
        under_way, self._under_way = self._under_way, []
        for future in under_way:
            if not future.cancelled():
                future.result()

    def _open(self) -> None:
        """Make a seat for each process, and let the server's own model lie where theirs will."""
        recipe, places = self.recipe, self.config.places
        if recipe is None:
            raise EngineError("engine pool has no recipe to make clients in its processes; use engine local")
        recipes = [_on(recipe, place) for place in places]
        weights = None
        if isinstance(self.clients, Sharing) and any(place in (None, "cpu") for place in places):
            weights = self._weights.enter_context(_nameless_file()).fileno()
            self.clients.share_weights(weights)
        threads, loading = torch.get_num_threads(), Lock()
        for placed, place in zip(recipes, places, strict=True):
            start = partial(ClientsProcess, placed, threads, weights, _environment(place))
            seat = Seat(start, loading)
            self._seats.append(seat)
            self._free.put(seat)

    def _is_asked(self, client: str) -> bool:
        """Whether a client has a question already; its memory would not bear two at once."""
        return any(question.client == client for question in self._asked.values())

    def _arrived(self) -> Iterator[Reply | ClientFailed]:
        """Wait for a reply; yield those that are there."""
        for future in wait(self._asked, return_when=FIRST_COMPLETED).done:
            del self._asked[future]
            yield future.result()

    def _answer(self, question: Question) -> Reply | ClientFailed:
        try:
            return self._ask("answer", question)  # type: ignore[no-any-return]
        except ProcessDied as died:
            return ClientFailed(
                question.round,
                question.client,
                f"its process ended while it was at work ({died}); if memory ran short, set fewer engine.processes",
            )

    def _go_on(self, question: Question) -> float:
        try:
            return self._ask("idle", question)  # type: ignore[no-any-return]
        except ProcessDied:
            return 0.0  # what was cut short is done when the client is asked again

    def _ask(self, what: Literal["answer", "idle"], question: Question) -> Any:
        seat = self._free.get()
        try:
            return seat.ask(what, question)
        finally:
            self._free.put(seat)

    def _wait(self) -> None:
        """Wait until no client is at work, and raise what stopped one."""
        wait(self._asked)
        self._asked.clear()
        started = time.perf_counter()
        under_way, self._under_way = self._under_way, []
        wait(under_way)
        waited_seconds = time.perf_counter() - started
        work_seconds = math.fsum(future.result() for future in under_way)
        self._idle = IdleTime(
            self._idle.work_seconds + work_seconds, self._idle.waited_seconds + min(waited_seconds, work_seconds)
        )


def _on(recipe: Recipe, device: str | None) -> Recipe:
    """Return the recipe for a process on that device. Raises: EngineError if it cannot be there."""
    if device is None:
        return recipe
    if not isinstance(recipe, Movable):
        raise EngineError("engine.devices: these clients cannot be put on devices; leave the key out")
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return recipe.on("cpu")
    if int(number) >= torch.cuda.device_count():
        raise EngineError(
            f"engine.devices names {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices here; name "
            f"others, or cpu"
        )
    return recipe.on("cuda")


def _environment(device: str | None) -> dict[str, str]:
    """Return what makes that CUDA device the only one that a process sees, and so its first."""
    if device is None or device == "cpu":
        return {}
    number = int(device.removeprefix("cuda:"))
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": str(number) if seen is None else seen.split(",")[number]}


def _nameless_file() -> IO[bytes]:
    """Return a file that is gone when no process has it any more. Raises: StorageError."""
    try:
        return tempfile.TemporaryFile(prefix="emberfed-")
    except OSError as error:
        raise StorageError(
            f"no file for the base model's weights can be made in {tempfile.gettempdir()}: {error.strerror or error}; "
            f"set TMPDIR to a folder that can be written"
        ) from error
