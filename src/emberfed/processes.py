"""A process of this machine with its own clients: started, asked, and mourned if it dies.

It is a fresh Python, never a fork (torch's threads do not survive one), and the program that starts it is not run
again in it, as Python's own `multiprocessing` would have it. Questions go to it, and answers come back, over a pair of
sockets, pickled: both ends are the same code of the same user. What clients exchange with the server stays bytes.

The process ends when its end of the pair is closed, so it never outlives the one that started it, however that ended.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any, Literal, NoReturn, Protocol, final, runtime_checkable

import torch

from emberfed.engine import Clients, Recipe
from emberfed.errors import EmberfedError, EngineError
from emberfed.records import ClientFailed, Question, Reply

_PATIENCE_SECONDS = 5.0
"""How long a process that was told to end may take; it then has no choice."""

_TENDED = "import sys; sys.path[:] = {path!r}; from emberfed.processes import tend; tend({descriptor})"


@runtime_checkable
class Sharing(Protocol):
    """Clients whose base model can lie in memory that processes share; `worker.Worker`."""

    def share_weights(self, file: int) -> None:
        """Let the model's weights lie in a file that other processes map; written if empty, else mapped.

        Args:
            file: Its descriptor.

        Raises: StorageError, ModelError.
        """
        ...


@runtime_checkable
class Movable(Recipe, Protocol):
    """A recipe that can be told where its model is to be; `assembly.WorkerRecipe`."""

    def on(self, device: Literal["cpu", "cuda"]) -> Recipe:
        """Return the recipe with another `model.device`."""
        ...


@final
class ProcessDied(Exception):
    """A process ended while it was asked for something; says how."""


@final
@dataclass(frozen=True, slots=True)
class _Order:
    """What a process needs before it can answer."""

    recipe: Recipe
    threads: int
    weights: int | None


@final
class ClientsProcess:
    """The handle of a process; one thread may ask it at a time, and any thread may end it."""

    def __init__(
        self, recipe: Recipe, threads: int, weights: int | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start it. It imports what it needs, and loads nothing yet.

        Args:
            recipe: Makes its clients.
            threads: CPU threads it computes with.
            weights: Descriptor of the file of shared weights; None: it keeps its own.
            environment: Variables to set in it, beside this process's.
        """
        self._connection, theirs = Pipe()
        command = _TENDED.format(path=sys.path, descriptor=theirs.fileno())
        handed_on = [theirs.fileno(), *(() if weights is None else (weights,))]
        try:
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, "-c", command],
                    stdin=subprocess.DEVNULL,
                    pass_fds=handed_on,
                    process_group=0,  # Ctrl-C is for the server, which then ends its processes
                    env={**os.environ, "OMP_NUM_THREADS": str(threads), **(environment or {})},
                )
        except OSError as error:
            raise EngineError(f"a process of engine pool cannot start: {error.strerror or error}") from error
        with suppress(ProcessDied):  # loading will find out
            self._send(_Order(recipe, threads, weights))

    @property
    def pid(self) -> int:
        """Its number."""
        return self._process.pid

    def load(self) -> None:
        """Let it load model and data. Raises: EmberfedError, as the recipe; EngineError if it dies."""
        try:
            self._send("load")
            self._receive()
        except ProcessDied as died:
            raise EngineError(
                f"a process of engine pool ended before it could answer ({died}); if memory ran short, set fewer "
                f"engine.processes, or model.expert_bits"
            ) from None

    def ask(self, what: Literal["answer", "idle"], question: Question) -> Any:
        """Let its clients do something. Raises: ProcessDied; EmberfedError, as the clients."""
        self._send((what, question))
        return self._receive()

    def end(self) -> None:
        """Tell it to end, and do not wait."""
        self._process.terminate()

    def wait(self) -> None:
        """Wait until it has ended; one that does not is killed."""
        try:
            self._process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._died() from None

    def _receive(self) -> Any:
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            raise self._died() from None
        if isinstance(message, EmberfedError):
            raise message
        return message

    def _died(self) -> ProcessDied:
        """Say how it ended; it has, or is about to."""
        self.wait()
        code = self._process.returncode
        return ProcessDied(f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}")


@final
class Seat:
    """The place of a process, and of the one that follows it if it dies; one thread at a time may ask."""

    def __init__(self, start: Callable[[], ClientsProcess], loading: Lock) -> None:
        """Take what makes a process, and what is held while one loads, so that the peak is that of one of them."""
        self._start = start
        self._loading = loading
        self._changing = Lock()
        self._closed = False
        self._process: ClientsProcess | None = None

    def ask(self, what: Literal["answer", "idle"], question: Question) -> Any:
        """Let the process do something; start one if there is none. Raises: ProcessDied; EmberfedError."""
        process = self._process or self._begun()
        try:
            return process.ask(what, question)
        except ProcessDied:
            self._process = None
            raise

    def end(self) -> None:
        """Tell the process to end, and let none follow it."""
        with self._changing:
            self._closed = True
            if self._process is not None:
                self._process.end()

    def wait(self) -> None:
        """Wait until it has ended."""
        process = self._process
        if process is not None:
            process.wait()

    def _begun(self) -> ClientsProcess:
        with self._changing:
            if self._closed:
                raise ProcessDied("the engine was closed")
            process = self._process = self._start()
        try:
            with self._loading:
                process.load()
        except EmberfedError:
            self._process = None
            process.end()
            process.wait()
            if self._closed:
                raise ProcessDied("the engine was closed") from None
            raise
        return process


def tend(descriptor: int) -> NoReturn:
    """Be such a process: take questions from one end of a pair of sockets until told to end, or the other is closed."""
    os.dup2(2, 1)  # what libraries print must not get among the server's own output
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # unwinds, so that no half-written file is left
    status = 0
    try:
        _work(Connection(descriptor))
    except Exception:
        traceback.print_exc()
        status = 1
    finally:
        os._exit(status)  # taking down the interpreter with all its libraries lasts seconds


def _work(connection: Connection) -> None:
    heard: SimpleQueue[bytes] = SimpleQueue()
    Thread(target=_listen, args=(connection, heard), daemon=True).start()
    with ExitStack() as stack:
        try:
            order: _Order = pickle.loads(heard.get())
            heard.get()  # the word to load
            torch.set_num_threads(order.threads)
            clients = stack.enter_context(order.recipe.open())
            if order.weights is not None and isinstance(clients, Sharing):
                clients.share_weights(order.weights)
        except Exception as error:
            connection.send(error if isinstance(error, EmberfedError) else _explained(error))
            return
        connection.send(None)
        _serve(clients, connection, heard)


def _serve(clients: Clients, connection: Connection, heard: SimpleQueue[bytes]) -> NoReturn:
    """Answer one question after the other."""
    while True:
        what, question = pickle.loads(heard.get())
        answer: Reply | ClientFailed | float | EmberfedError
        try:
            answer = clients.answer(question) if what == "answer" else clients.idle(question)
        except EmberfedError as error:
            answer = error
        connection.send(answer)


def _explained(error: Exception) -> EngineError:
    """Return one line about an error that is no user's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where, what = f"{Path(frame.filename).name}:{frame.lineno}", " ".join(str(error).split())
    return EngineError(f"a process of engine pool cannot start: {type(error).__name__} at {where}: {what}")


def _listen(connection: Connection, heard: SimpleQueue[bytes]) -> None:
    """Take in what is sent; when nothing can come any more, end the process, whatever it is doing."""
    with suppress(EOFError, OSError):
        while True:
            heard.put(connection.recv_bytes())
    os._exit(1)
