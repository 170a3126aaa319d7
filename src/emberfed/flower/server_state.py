"""What a server keeps of its SuperLink: the files of its state folder, and the locks that say who is alive.

Locks are the system's (`flock`): it lets go of a killed process's, so nothing here can be left behind by one.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

from emberfed import storage
from emberfed.errors import EngineError

SECRET_HEADER = "emberfed-secret"
_PAUSE_SECONDS = 0.02


@final
@dataclass(frozen=True, slots=True)
class Serving:
    """What a SuperLink is asked to serve. Servers that share one must ask for the same.

    Attributes:
        host: The address that clients reach it at is on this interface.
        port: The port there.
        certificates: The absolute path of the server's certificates and its clients' keys; None: plain HTTP.
        grace_seconds: How long it stays when all its servers are gone without a word.
    """

    host: str
    port: int
    certificates: str | None
    grace_seconds: float

    @property
    def address(self) -> str:
        """Return `host:port`, as an address is written."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


@final
@dataclass(frozen=True, slots=True)
class Running:
    """A SuperLink that is at work.

    Attributes:
        process: Its process id.
        port: Where it listens on the loopback, for its servers.
        serving: What it serves.
    """

    process: int
    port: int
    serving: Serving


@final
@dataclass(frozen=True, slots=True)
class ServerState:
    """A server's state folder, `root`, as far as its SuperLink is concerned. Only its owner may enter."""

    root: Path

    @property
    def database(self) -> Path:
        """Nodes, runs, messages and what they carry."""
        return self.root / "superlink.db"

    @property
    def log(self) -> Path:
        """What the SuperLink wrote."""
        return self.root / "superlink.log"

    @property
    def home(self) -> Path:
        """Flower's own folder."""
        return self.root / "flower"

    @property
    def servers(self) -> Path:
        """Locked (shared) by every server that uses the SuperLink."""
        return self.root / "servers.lock"

    @property
    def starting(self) -> Path:
        """Locked by the one server that is starting the SuperLink, or a run on it."""
        return self.root / "starting.lock"

    @property
    def alive(self) -> Path:
        """Locked by the SuperLink as long as it lives."""
        return self.root / "superlink.lock"

    def make(self) -> None:
        """Make the folder. Raises: StorageError."""
        with storage.explained(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            self.root.chmod(0o700)
            self.home.mkdir(exist_ok=True)

    def secret(self) -> str:
        """Return what a process must know to be served on the loopback; it is made at the first call.

        Raises: StorageError.
        """
        path = self.root / "secret"
        if not path.exists():
            storage.write(path, secrets.token_hex().encode())
        with storage.explained(path):
            path.chmod(0o600)
            return path.read_text()

    def write_running(self, running: Running) -> None:
        """Say where the SuperLink is. Raises: StorageError."""
        storage.write_json(self._running, asdict(running))

    def forget_running(self) -> None:
        """Take that back, before a new one starts."""
        self._running.unlink(missing_ok=True)

    def running(self) -> Running | None:
        """Return where the SuperLink is, if one is alive and has said so."""
        if free(self.alive) or not self._running.exists():
            return None
        told: Mapping[str, object] = json.loads(self._running.read_bytes())
        serving = told["serving"]
        return Running(**{**told, "serving": Serving(**serving)})  # type: ignore[arg-type]

    @property
    def _running(self) -> Path:
        return self.root / "superlink.json"


def hold(path: Path, kind: int) -> int | None:
    """Lock a file (`fcntl.LOCK_EX`, `LOCK_SH`) if nobody holds it otherwise; `os.close` the result to let go.

    Returns: A file descriptor that programs started from here do not inherit, or None.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def free(path: Path) -> bool:
    """Tell whether nobody holds a lock on a file."""
    descriptor = hold(path, fcntl.LOCK_EX)
    if descriptor is None:
        return False
    os.close(descriptor)
    return True


@contextmanager
def held(path: Path, kind: int, wait_seconds: float, why: str) -> Iterator[int]:
    """Hold a lock inside the block, after waiting for it. Raises: EngineError that says `why` if it stays taken."""
    descriptor = wait_for(path, kind, wait_seconds, why)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def wait_for(path: Path, kind: int, wait_seconds: float, why: str) -> int:
    """As `hold`, but wait. Raises: EngineError that says `why` if it stays taken."""
    until = time.monotonic() + wait_seconds
    while (descriptor := hold(path, kind)) is None:
        if time.monotonic() >= until:
            raise EngineError(why)
        time.sleep(_PAUSE_SECONDS)
    return descriptor
