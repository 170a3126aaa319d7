"""The interface of an engine: one verb that runs jobs somewhere and brings back values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, final

from emberfed import plugins
from emberfed.errors import ConfigError, closest, one_of
from emberfed.records import ClientFailed, Question, Reply
from emberfed.sections import Section


class Clients(Protocol):
    """The clients as an engine sees them: `worker.Worker`."""

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        """Answer as the client that is asked."""
        ...

    def idle(self, question: Question, /) -> float:
        """Do what that client does once its answer is out, while the server goes on; return the seconds it took.

        Raises: StorageError.
        """
        ...


class Recipe(Protocol):
    """How to make the same clients again in another process; it can be pickled. `assembly.WorkerRecipe`."""

    def open(self) -> AbstractContextManager[Clients]:
        """Load model and data here, and give the clients. Raises: EmberfedError."""
        ...


@final
@dataclass(frozen=True, slots=True)
class IdleTime:
    """What clients did while the server went on.

    Attributes:
        work_seconds: How long they worked.
        waited_seconds: How much of that the server waited for, before it could ask them again.
    """

    work_seconds: float = 0.0
    waited_seconds: float = 0.0


class Engine(ABC):
    """Where clients run. The rounds only ever call `map`.

    Attributes:
        Config: The options of the `engine` section.
        deployed: Whether clients are on machines of their own, with data of their own; `emberfed server` then runs it.
    """

    Config: ClassVar[type[Section]]
    deployed: ClassVar[bool] = False

    def __init__(self, config: Any, clients: Clients, recipe: Recipe | None = None) -> None:
        """Take what an engine works with.

        Args:
            config: The checked section, an instance of `Config`.
            clients: The clients, in this process.
            recipe: For engines whose clients are in other processes.
        """
        self.config = config
        self.clients = clients
        self.recipe = recipe

    @abstractmethod
    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask; replies come in any order. A failure is a value: not an exception, not silence.

        `questions` is taken lazily, so that downloads of many clients need not sit in memory together. Clients may go
        on with idle work after the last reply; the next `map` waits for it.
        """

    def take_idle(self) -> IdleTime:
        """Return what clients did in idle time that is over, since it was last asked; nothing by default."""
        return IdleTime()

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Release processes and connections; idle work may be left for later. Safe to call twice."""


def engine_names() -> list[str]:
    """Return the names that `load_engine` takes."""
    return [name.replace("_", "-") for name in plugins.names("emberfed.engines")]


def load_engine(name: str) -> type[Engine]:
    """Return the engine of that name, whose file has `_` for `-`.

    Raises: ConfigError listing what exists if it is unknown, or naming the extra that is not installed.
    """
    plain, existing = str(name).replace("_", "-"), engine_names()
    if plain not in existing:
        raise ConfigError(f"unknown engine {name!r}{closest(plain, existing)} (there are {one_of(existing)})")
    return plugins.load("emberfed.engines", plain.replace("-", "_"), Engine)  # type: ignore[type-abstract]
