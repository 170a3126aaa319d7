"""A server's share in its SuperLink: started if there is none, found if there is, started again if it died."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import final

from emberfed import storage
from emberfed.errors import EngineError
from emberfed.flower.environment import environment
from emberfed.flower.server_state import Running, ServerState, Serving, free, held, hold, wait_for

_START_SECONDS = 120.0
_LEAVE_SECONDS = 15.0
_POLL_SECONDS = 0.05
_ALONE_TRIES = 10
_LOG_TAIL_BYTES = 4096
_BACKLOG = 2048


@final
class SuperLinkProcess:
    """One server's share in a SuperLink, which lives as long as any server has one."""

    def __init__(self, state: ServerState, serving: Serving) -> None:
        """Take a share in what runs in the state folder, or will.

        Raises: EngineError, StorageError.
        """
        self.state = state
        self.serving = serving
        state.make()
        why = f"the SuperLink of {state.root} does not end: see {state.log}"
        self._share: int | None = wait_for(state.servers, fcntl.LOCK_SH, _START_SECONDS, why)

    def running(self) -> Running:
        """Return the SuperLink, started anew if it is not alive.

        Raises: EngineError, StorageError.
        """
        with self.starting():
            running = self.state.running() or self._start()
        if running.serving != self.serving:
            raise EngineError(
                f"the SuperLink of {self.state.root} serves {_said(running.serving)}, and here {_said(self.serving)} "
                f"is asked for: ask for the same, or use another state folder"
            )
        return running

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Keep other servers from starting anything on this SuperLink inside the block. Raises: EngineError."""
        why = f"another server with the state folder {self.state.root} does not get its SuperLink started"
        with held(self.state.starting, fcntl.LOCK_EX, _START_SECONDS, why):
            yield

    def last_line(self, since_bytes: int = 0) -> str:
        """Return the last line of the SuperLink's log, after so many bytes of it."""
        if not self.state.log.exists():
            return "it wrote nothing"
        with self.state.log.open("rb") as file:
            file.seek(max(since_bytes, self.state.log.stat().st_size - _LOG_TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
        return next((line for line in reversed(lines) if line), "it wrote nothing")

    def leave(self) -> None:
        """Give the share back; the last to do so ends the SuperLink. Safe to call twice."""
        if self._share is None:
            return
        share, self._share = self._share, None
        with self.starting():
            os.close(share)
            running = self.state.running()
            alone = self._hold_alone()
            if alone is not None:
                if running is not None:
                    self._end(running)
                os.close(alone)

    def _start(self) -> Running:
        state, began = self.state, time.monotonic()
        state.forget_running()
        state.secret()
        since_bytes = state.log.stat().st_size if state.log.exists() else 0
        public, private = _listening(self.serving), _listening_on_loopback()
        with storage.explained(state.log), public, private, state.log.open("ab") as log:
            descriptors = [public.fileno(), private.fileno()]
            told = [str(state.root.absolute()), json.dumps(asdict(self.serving)), *map(str, descriptors)]
            child = subprocess.Popen(
                [sys.executable, "-m", "emberfed.flower.superlink", *told],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"MALLOC_ARENA_MAX": "2", **environment(state.home)},  # messages pass through many threads
                pass_fds=descriptors,
                start_new_session=True,  # it outlives a server that is killed, and a Ctrl-C is not meant for it
            )
        threading.Thread(target=child.wait, name="SuperLink's end", daemon=True).start()
        while (running := state.running()) is None:
            if child.poll() is not None:
                raise EngineError(f"the SuperLink did not start: {self.last_line(since_bytes)} (see {state.log})")
            if time.monotonic() - began > _START_SECONDS:
                child.kill()
                raise EngineError(f"the SuperLink did not start within {_START_SECONDS:g} s: see {state.log}")
            time.sleep(_POLL_SECONDS)
        return running

    def _hold_alone(self) -> int | None:
        """Lock all servers out, or return None if there are others; the SuperLink itself looks now and then."""
        for _ in range(_ALONE_TRIES):
            if (alone := hold(self.state.servers, fcntl.LOCK_EX)) is not None:
                return alone
            time.sleep(_POLL_SECONDS)
        return None

    def _end(self, running: Running) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            os.kill(running.process, number)
            until = time.monotonic() + _LEAVE_SECONDS
            while time.monotonic() < until:
                if free(self.state.alive):
                    return
                time.sleep(_POLL_SECONDS)


def _said(serving: Serving) -> str:
    secured = (
        "without certificates" if serving.certificates is None else f"with the certificates {serving.certificates}"
    )
    return f"{serving.address} {secured}"


def _listening(serving: Serving) -> socket.socket:
    """Return a socket that listens for clients. Raises: EngineError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            serving.host, serving.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "no name of a machine"
        raise EngineError(
            f"{serving.host!r} is no address to listen on: {why}; name one of this machine, or 0.0.0.0"
        ) from error
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(_BACKLOG)
    except OSError as error:
        listening.close()
        raise EngineError(_cannot_listen(serving, error)) from error
    return listening


def _cannot_listen(serving: Serving, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {serving.port} of {serving.host} is taken: stop what has it, or choose another (engine.port)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{serving.host} is no address of this machine: name one of its own, or 0.0.0.0 for all (engine.host)"
    if error.errno == errno.EACCES:
        return f"port {serving.port} is only for administrators: choose one above 1023 (engine.port)"
    return f"cannot listen on {serving.address}: {error.strerror}"


def _listening_on_loopback() -> socket.socket:
    return socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG)
