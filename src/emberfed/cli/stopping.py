"""Ctrl-C and SIGTERM: the run stops at once and stays resumable; a second signal kills."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar, final

from emberfed.errors import EngineError, Interrupted, RoundFailed, StorageError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
E = TypeVar("E")


@final
class _Asked(KeyboardInterrupt):
    """What a signal raises.

    Where exactly KeyboardInterrupt leaves an `exec` of source (every dataclass is made by one), CPython 3.11 kills the
    process by SIGINT at its end, however the exception was handled; a subclass does not.
    """


@final
class Stop:
    """Remembers that the user asked to stop.

    The signal's exception can be lost where Python ignores exceptions (in a destructor, say), so the next event
    raises it again.
    """

    def __init__(self) -> None:
        """Nobody has asked yet."""
        self._asked = False

    def before(self, listen: Callable[[E], None]) -> Callable[[E], None]:
        """Return a listener that stops the run if that was asked, and otherwise passes events on."""

        def hear(event: E) -> None:
            if self._asked:
                raise _Asked
            listen(event)

        return hear

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Raise KeyboardInterrupt at SIGINT and SIGTERM; what was ignored (`nohup`, background jobs) stays ignored."""
        heard = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._ask) for number in heard}
        try:
            yield
        except Exception as error:
            if self._asked:  # a library made an error of its own of the interruption
                raise _Asked from error
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        raise _Asked


@contextmanager
def resumable(run: Path, command: str | None = None) -> Iterator[None]:
    """Say how to go on with a run that ended early: by `command`, or `emberfed resume`.

    Raises: Interrupted, RoundFailed, StorageError, EngineError.
    """
    command = resume_command(run) if command is None else command
    try:
        yield
    except KeyboardInterrupt:
        if not _begun(run):
            raise Interrupted("stopped; nothing was written. Start again with the same command") from None
        raise Interrupted(f"stopped; finished clients are kept. Go on with: {command}") from None
    except (RoundFailed, StorageError, EngineError) as error:
        if not _begun(run):
            raise
        raise type(error)(f"{error}. Go on with: {command}") from error


def resume_command(run: Path) -> str:
    """Return the command that goes on with a run."""
    return f"emberfed resume {shlex.quote(str(run))}"


def _begun(run: Path) -> bool:
    return (run / "config.yaml").is_file()
