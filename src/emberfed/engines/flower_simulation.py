"""Flower's simulation runtime: clients train at the same time in processes that Ray keeps on this machine.

For trying a federation on Flower without machines of its own. The pool engine starts sooner, and shares the base
model's memory among its processes; here each has its own.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any, Self, final

import torch
from pydantic import Field, model_validator

from emberfed.engine import Clients, Engine, IdleTime, Recipe
from emberfed.errors import ConfigError, EngineError
from emberfed.records import ClientFailed, Job, Question, Reply
from emberfed.sections import Section

try:
    from emberfed.flower.conversation import Conversation, ConversationConfig, Lost
    from emberfed.flower.simulation import Runtime, SimulationLink, rested
    from emberfed.flower.wire import Hello

    if importlib.util.find_spec("ray") is None:  # not imported here: it reads its environment when it is
        raise ModuleNotFoundError("No module named 'ray'", name="ray")
except ModuleNotFoundError as missing:
    raise ConfigError(f"engine flower-simulation needs {missing.name}: pip install 'emberfed[simulation]'") from missing

_POLL_SECONDS = 0.02


class FlowerSimulationConfig(Section):
    """How many processes there are, and how long they are waited for.

    Each computes with as many CPU threads as the server (`model.threads`; set it to cores / processes, or they stand in
    each other's way).

    Attributes:
        processes: How many clients train at once, each in a process of its own with a base model of its own.
        gpus: How much of a GPU each process has: 1, or 0.5 for two on one; 0: none.
        in_flight: Questions that are out at once, at least `processes`: so many downloads are kept.
        deadline_seconds: A question that is not answered so long after it was formed has failed.
    """

    processes: int = Field(2, ge=1, le=1024)
    gpus: float = Field(0.0, ge=0, le=64)
    in_flight: int = Field(16, ge=1)
    deadline_seconds: float = Field(86400.0, gt=0)

    @model_validator(mode="after")
    def _work_for_all(self) -> Self:
        if self.in_flight < self.processes:
            raise ValueError(f"in_flight is {self.in_flight}, which leaves some of {self.processes} processes idle")
        return self


@final
class FlowerSimulationEngine(Engine):
    """Asks whichever of Ray's processes is free."""

    Config = FlowerSimulationConfig

    def __init__(self, config: Any, clients: Clients, recipe: Recipe | None = None) -> None:
        """Start nothing yet: Flower and Ray start with the first question."""
        super().__init__(config, clients, recipe)
        self._link: SimulationLink | None = None
        self._resting: list[str] = []
        self._idle = IdleTime()

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask whoever is free; then let all clients go on.

        Raises:
            EngineError: if Flower or Ray does not start, or ends.
            EmberfedError: if a process cannot load, or finds the disk full.
        """
        self._wait()
        remaining = iter(questions)
        first = next(remaining, None)
        if first is None:
            return
        link = self._started()
        tiers: dict[str, str] = {}
        jobs: list[tuple[int, str]] = []

        def enrolled() -> Iterator[Question]:
            for question in chain([first], remaining):
                link.enrol(question.client)
                tiers[question.client] = ""  # a simulated client has the configuration, and needs not be told
                if isinstance(question, Job):
                    jobs.append((question.round, question.client))
                yield question

        config: FlowerSimulationConfig = self.config
        settings = ConversationConfig(
            deadline_seconds=config.deadline_seconds, in_flight=config.in_flight, poll_seconds=_POLL_SECONDS
        )
        yield from Conversation(link, Hello("simulation", {}), tiers, settings).map(enrolled())
        shares = [jobs[start :: config.processes] for start in range(config.processes)]
        self._resting = [link.rest(share, config.deadline_seconds) for share in shares if share]

    def take_idle(self) -> IdleTime:
        """Return the sums since the last call: seconds of work in all processes, and those waited for them."""
        idle, self._idle = self._idle, IdleTime()
        return idle

    def close(self) -> None:
        """End Flower, Ray and its processes; idle work that was cut short is done when it is needed."""
        link, self._link = self._link, None
        self._resting = []
        if link is not None:
            link.close()

    def _started(self) -> SimulationLink:
        if self._link is None:
            config: FlowerSimulationConfig = self.config
            if self.recipe is None:
                raise EngineError("engine flower-simulation has no recipe to make clients elsewhere; use engine local")
            wanted, there = math.ceil(config.processes * config.gpus), torch.cuda.device_count()
            if wanted > there:
                raise EngineError(
                    f"engine.processes {config.processes} with engine.gpus {config.gpus:g} each need {wanted} GPUs, "
                    f"and there are {there}; set fewer processes, or engine.gpus=0 and model.device=cpu"
                )
            self._link = SimulationLink(self.recipe, Runtime(config.processes, config.gpus, config.in_flight))
        return self._link

    def _wait(self) -> None:
        """Wait until no client is at work. Raises: StorageError, if one found the disk full."""
        resting, self._resting = self._resting, []
        if self._link is None or not resting:
            return
        started = time.perf_counter()
        work_seconds = 0.0
        for message in resting:
            while (reply := self._link.pull(message)) is None:
                time.sleep(_POLL_SECONDS)
            if not isinstance(reply, Lost):  # work that was lost is done when it is needed
                work_seconds += rested(reply)
        waited_seconds = time.perf_counter() - started
        self._idle = IdleTime(
            self._idle.work_seconds + work_seconds, self._idle.waited_seconds + min(waited_seconds, work_seconds)
        )
