"""The interface of an engine: one verb that runs jobs somewhere and brings back values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

from emberfed import plugins
from emberfed.records import Assessment, ClientFailed, Job, Reply
from emberfed.sections import Section

Answer = Callable[[Job | Assessment], Reply | ClientFailed]
"""What a client does with a job: `worker.Worker.answer`."""


class Engine(ABC):
    """Where clients run. The rounds only ever call `map`.

    Attributes:
        Config: The options of the `engine` section.
    """

    Config: ClassVar[type[Section]]

    def __init__(self, config: Any, answer: Answer) -> None:
        """Take the checked section, an instance of `Config`, and what a client does with a job."""
        self.config = config
        self.answer = answer

    @abstractmethod
    def map(self, jobs: Iterable[Job | Assessment]) -> Iterator[Reply | ClientFailed]:
        """Run the jobs; replies come in any order. A failure is a value: not an exception, not silence.

        `jobs` is taken lazily, so that downloads of many clients need not sit in memory together.
        """

    def close(self) -> None:  # noqa: B027 - most engines hold nothing
        """Release processes and connections; safe to call twice."""


def engine_names() -> list[str]:
    """Return the names that `load_engine` takes."""
    return plugins.names("emberfed.engines")


def load_engine(name: str) -> type[Engine]:
    """Return the engine of that name. Raises: ConfigError listing what exists if it is unknown."""
    return plugins.load("emberfed.engines", name, Engine)  # type: ignore[type-abstract]
