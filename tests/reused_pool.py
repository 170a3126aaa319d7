"""One pool for many runs: its processes import torch once, and take up one run's clients after another's."""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from emberfed import assembly, rounds
from emberfed.checkpoint import RunFolder
from emberfed.config import parse
from emberfed.engine import Clients
from emberfed.engines.pool import PoolConfig, PoolEngine
from emberfed.processes import Sharing
from emberfed.records import ClientFailed, Question, Reply


@final
class _Relayed:
    """The clients of the recipe that lies in a file now. Their base model's weights are mapped, as a pool's are."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._opened = b""
        self._holding = ExitStack()
        self._clients: Clients

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        return self._now().answer(question)

    def idle(self, question: Question, /) -> float:
        return self._now().idle(question)

    def _now(self) -> Clients:
        there = self._path.read_bytes()
        if there != self._opened:
            self._holding.close()
            self._clients = self._holding.enter_context(pickle.loads(there).open())
            if isinstance(self._clients, Sharing):
                with tempfile.TemporaryFile() as file:
                    self._clients.share_weights(file.fileno())
            self._opened = there
        return self._clients


@final
@dataclass(frozen=True)
class _Relay:
    """A recipe for them."""

    path: Path

    @contextmanager
    def open(self) -> Iterator[Clients]:
        yield _Relayed(self.path)


@final
class ReusedPool:
    """A pool engine that carries out any number of runs."""

    def __init__(self, folder: Path, processes: int = 2) -> None:
        """Keep what its processes are told in a folder."""
        self._path = folder / "recipe.pickle"
        clients = _Relayed(self._path)
        self._engine = PoolEngine(PoolConfig(processes=processes), clients, _Relay(self._path))

    def run(self, values: dict[str, Any], path: Path, materials: assembly.Materials) -> RunFolder:
        """Carry out a run without its report; what the config says of the engine does not count."""
        checked = parse(values)
        material = materials.gather(checked)
        folder = assembly.start(checked, path, material)
        federation = assembly.federate(checked, folder, material)
        recipe = federation.engine.recipe
        federation.engine.close()
        list(self._engine.map([]))  # clients of the run before may be at work
        self._engine.take_idle()
        self._path.write_bytes(pickle.dumps(recipe))
        rounds.run(replace(federation, engine=self._engine), folder)
        return folder

    def close(self) -> None:
        """End the processes."""
        self._engine.close()
