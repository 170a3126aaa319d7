"""What a command leaves behind: results on standard output, errors as one line on standard error."""

from __future__ import annotations

import json
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, final

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from emberfed.errors import EmberfedError, Interrupted


class Output(ABC):
    """Where a command's result and its error go."""

    @abstractmethod
    def result(self, document: Any, *renderables: RenderableType) -> None:
        """Give the result, which is both a JSON document and something to look at."""

    def failure(self, message: str, code: int) -> None:
        """Give an error: one line on standard error, without the colours where it is no terminal."""
        console = Console(stderr=True, markup=False, highlight=False, emoji=False)
        console.print(Text("emberfed: ", style="bold red") + Text(message), soft_wrap=True)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn what a user can meet into one line and its exit code. Raises: typer.Exit."""
        try:
            yield
        except KeyboardInterrupt:
            self.failure("stopped", Interrupted.exit_code)
            raise typer.Exit(Interrupted.exit_code) from None
        except EmberfedError as error:
            line = " ".join(str(error).split())
            self.failure(line if isinstance(error, Interrupted) else f"error: {line}", error.exit_code)
            raise typer.Exit(error.exit_code) from None


@final
class Human(Output):
    """Tables and sentences."""

    def result(self, document: Any, *renderables: RenderableType) -> None:
        """Print what there is to look at."""
        console = Console(markup=False, highlight=False, emoji=False)
        for renderable in renderables:
            # Sentences hold paths and commands to copy: they are never cut at the edge of the terminal.
            console.print(renderable, soft_wrap=isinstance(renderable, str | Text))


@final
class Machine(Output):
    """One JSON document on standard output and nothing else."""

    def result(self, document: Any, *renderables: RenderableType) -> None:
        """Print the document; a number that was not recorded is null."""
        print(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False), file=sys.stdout)

    def failure(self, message: str, code: int) -> None:
        """Print the line, and the error as a document."""
        super().failure(message, code)
        self.result({"error": message.removeprefix("error: "), "exit_code": code})


def output(as_json: bool) -> Output:
    """Return where results go, by the option `--json`."""
    return Machine() if as_json else Human()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
