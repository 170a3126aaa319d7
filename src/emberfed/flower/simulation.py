"""Flower's simulation runtime as a link: virtual nodes, for which Ray's processes on this machine do the work.

Any process answers for any client, since a question names its client and what a client keeps is on disk. Each loads
model and data once. Ray is confined to the loopback interface, and tells nobody of its use.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread, current_thread, main_thread
from typing import Any, final

import psutil
import torch
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from emberfed.engine import Clients, Recipe
from emberfed.errors import EmberfedError, EngineError, RunFolderError
from emberfed.flower.conversation import Lost
from emberfed.flower.environment import QUIET
from emberfed.flower.wire import Asked, answered, read_asked
from emberfed.records import Job

_ASK = "train"
_REST = "query"
_RESTED = "rested"
_STOPPED = "stopped"
_START_SECONDS = 120.0
_END_SECONDS = 10.0
_LONGEST_REASON = 300
_ALONE: Mapping[str, str] = {
    **QUIET,
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # read on every system: a cluster of this machine alone, on loopback
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else it warns that this will be its default
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".*",  # it prints what becomes of processes, into whatever the program prints
}


@final
@dataclass(frozen=True, slots=True)
class Runtime:
    """What the simulation runs on.

    Attributes:
        processes: How many of Ray's work at once.
        gpus: How much of a GPU each has; 0: none is set aside.
        nodes: Virtual nodes; Flower hands each one message at a time.
    """

    processes: int
    gpus: float
    nodes: int


@final
class SimulationLink:
    """A `Link` to clients that are simulated."""

    def __init__(self, recipe: Recipe, runtime: Runtime) -> None:
        """Start Flower's runtime and Ray; its processes load when they are first asked.

        Args:
            recipe: Makes the clients.
            runtime: What to start.

        Raises: EngineError if they do not start.
        """
        self._clients: dict[str, int] = {}
        self._grids: SimpleQueue[Grid] = SimpleQueue()
        self._closing = Event()
        self._trouble: BaseException | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="emberfed-ray-"))
        self._silence = ExitStack()
        app = _client_app(_Work(pickle.dumps(recipe), torch.get_num_threads()))
        self._thread = Thread(target=self._run, args=(app, runtime), name="flower simulation", daemon=True)
        try:
            with _surroundings(self._folder):
                import ray  # reads its variables now, and sets its loggers' levels

                self._silence.enter_context(_silent_loggers())
                self._thread.start()
                self._grid, self._nodes = self._started(runtime, ray.is_initialized)
                _take_back_sigterm()
        except BaseException:
            self.close()
            raise

    def nodes(self) -> Mapping[str, int]:
        """Return the virtual node of every client that was enrolled."""
        return self._clients

    def enrol(self, client: str) -> None:
        """Give a client a virtual node, if it has none."""
        self._clients.setdefault(client, self._nodes[len(self._clients) % len(self._nodes)])

    def push(self, node: int, content: RecordDict, ttl_seconds: float) -> str:
        """Send to a virtual node. Raises: EngineError if Flower's runtime has ended."""
        return self._send(_ASK, node, content, ttl_seconds)

    def rest(self, jobs: Sequence[tuple[int, str]], ttl_seconds: float) -> str:
        """Let clients (round, id) go on in one of the processes; the answer to the message is read by `rested`."""
        content = RecordDict({_RESTED: ConfigRecord({"jobs": json.dumps(jobs)})})
        return self._send(_REST, self._nodes[0], content, ttl_seconds)

    def pull(self, message: str) -> RecordDict | Lost | None:
        """Return the reply, if there is one.

        Raises: EngineError if Flower's runtime has ended. StorageError, or whatever the recipe raised, from a process.
        """
        self._check()
        for reply in self._grid.pull_messages([message]):
            if reply.has_error():
                return Lost(_why(reply.error.reason or ""), away=False)
            stopped = reply.content.config_records.get(_STOPPED)
            if stopped is not None:
                raise _error(stopped)
            return reply.content
        return None

    def close(self) -> None:
        """End Flower's runtime and Ray's processes, whatever they are doing. Safe to call twice."""
        family = _family(self._folder)
        self._closing.set()
        with _surroundings(self._folder):
            if self._thread.ident is not None:
                self._thread.join()
            _see_off(family)
        self._silence.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _send(self, kind: str, node: int, content: RecordDict, ttl_seconds: float) -> str:
        self._check()
        (message,) = self._grid.push_messages([Message(content, node, kind, ttl=ttl_seconds)])
        return message

    def _run(self, app: ClientApp, runtime: Runtime) -> None:
        """Be the thread that Flower's runtime takes for itself."""
        server = ServerApp()

        @server.main()
        def main(grid: Grid, _: Context) -> None:
            self._grids.put(grid)
            self._closing.wait()

        # Flower hands all of these to Ray. A process that dies is replaced, and its question asked once more; without
        # that, a client that is asked before the new one runs would fail, too.
        resources = {"num_cpus": 1, "num_gpus": runtime.gpus, "max_restarts": -1, "max_task_retries": 1}
        ray = {
            "num_cpus": runtime.processes,
            "num_gpus": math.ceil(runtime.processes * runtime.gpus),
            "include_dashboard": False,
            "configure_logging": False,
            "log_to_driver": False,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": str(self._folder),
        }
        try:
            run_simulation(server, app, runtime.nodes, "ray", {"init_args": ray, "client_resources": resources})  # type: ignore[dict-item]
        except BaseException as error:
            self._trouble = error
            self._closing.set()

    def _started(self, runtime: Runtime, ray_runs: Callable[[], bool]) -> tuple[Grid, list[int]]:
        """Wait until messages can be sent. Raises: EngineError."""
        end = time.monotonic() + _START_SECONDS
        grid: Grid | None = None
        while time.monotonic() < end:
            self._check()
            try:
                grid = grid or self._grids.get(timeout=0.1)
            except Empty:
                continue
            nodes = sorted(grid.get_node_ids())
            if len(nodes) == runtime.nodes and ray_runs():
                return grid, nodes
            time.sleep(0.1)
        raise EngineError(f"Flower's simulation did not start within {_START_SECONDS:g} s; use engine local or pool")

    def _check(self) -> None:
        if self._closing.is_set() or not self._thread.is_alive():
            root = self._trouble
            while root is not None and root.__cause__ is not None:
                root = root.__cause__
            why = "it was closed" if root is None else f"{type(root).__name__}: {_why(str(root))}"
            raise EngineError(f"Flower's simulation has ended ({why}); the run can be resumed")


def rested(reply: RecordDict) -> float:
    """Return the seconds that clients worked, from the reply to `SimulationLink.rest`."""
    record = reply.config_records[_RESTED]
    seconds = record["seconds"]
    assert isinstance(seconds, float)
    return seconds


def _client_app(work: _Work) -> ClientApp:
    """Return what each of Ray's processes runs for each message."""
    app = ClientApp()

    @app.train()
    def answer(message: Message, _: Context) -> Message:
        return Message(_content(work, message.content, _answer), reply_to=message)

    @app.query()
    def rest(message: Message, _: Context) -> Message:
        return Message(_content(work, message.content, _rest), reply_to=message)

    return app


def _content(work: _Work, content: RecordDict, do: Callable[[Clients, RecordDict], RecordDict]) -> RecordDict:
    """Return the reply's content; an error that stops the run, as in a run without processes, is told as such."""
    try:
        return do(_opened(work).clients, content)
    except EmberfedError as error:
        return RecordDict({_STOPPED: ConfigRecord({"error": type(error).__name__, "message": str(error)})})


def _answer(clients: Clients, content: RecordDict) -> RecordDict:
    message = read_asked(content)
    if not isinstance(message, Asked):
        raise RunFolderError("a simulated client was asked to describe itself")
    return answered(clients.answer(message.question))


def _rest(clients: Clients, content: RecordDict) -> RecordDict:
    jobs = json.loads(str(content.config_records[_RESTED]["jobs"]))
    seconds = math.fsum(clients.idle(Job(round, client, b"")) for round, client in jobs)
    return RecordDict({_RESTED: ConfigRecord({"seconds": seconds})})


@final
@dataclass(frozen=True, slots=True)
class _Work:
    """What a process of Ray is there for: a pickled `Recipe`, and with how many threads it computes."""

    recipe: bytes
    threads: int


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """Clients, and what holds them open until the process ends."""

    clients: Clients
    holding: ExitStack


@lru_cache(maxsize=1)
def _opened(work: _Work) -> _Opened:
    """Open the recipe, once in a process. Raises: EmberfedError."""
    torch.set_num_threads(work.threads)
    holding = ExitStack()
    try:
        recipe: Recipe = pickle.loads(work.recipe)
        return _Opened(holding.enter_context(recipe.open()), holding)
    except EmberfedError:
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}"
        what = f"{type(error).__name__} at {where}: {_why(str(error))}"
        raise EngineError(f"a process of engine flower-simulation cannot start: {what}") from None


def _error(record: Mapping[str, Any]) -> EmberfedError:
    kinds = {kind.__name__: kind for kind in EmberfedError.__subclasses__()}
    return kinds[record["error"]](record["message"])


def _why(text: str) -> str:
    """Return one line; Ray writes pages."""
    if "ActorDiedError" in text or "ActorUnavailableError" in text:
        return "the process that it was in died; if memory ran short, set fewer engine.processes"
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_REASON else f"{line[:_LONGEST_REASON]}..."


def _family(folder: Path) -> list[psutil.Process]:
    """Return Ray's processes: those of this one's children that work in the folder, and theirs."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if str(folder) in " ".join(child.cmdline()):
                found += [child, *child.children(recursive=True)]
    return found


def _see_off(family: Sequence[psutil.Process]) -> None:
    """Wait until processes have ended; those that take too long are killed."""
    patience = time.monotonic() + _END_SECONDS
    while left := [process for process in family if _is_alive(process)]:
        if time.monotonic() > patience:
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        time.sleep(0.05)


def _is_alive(process: psutil.Process) -> bool:
    """Whether it still runs: one that ended may wait, dead, for whoever adopted it."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _take_back_sigterm() -> None:
    """Let SIGTERM do what it did: Ray takes it, prints addresses, and ends the process where it stands."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is not None and current_thread() is main_thread():
        signal.signal(signal.SIGTERM, handler)


@contextmanager
def _silent_loggers() -> Iterator[None]:
    """Keep Flower's and Ray's messages off the terminal: what matters in them is raised or told as a failure."""
    loggers = [logging.getLogger(name) for name in ("flwr", "ray")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _surroundings(folder: Path) -> Iterator[None]:
    """Let Ray start or end with its variables set, then set them back."""
    values = {**_ALONE, "FLWR_HOME": str(folder), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    before = dict(os.environ)
    os.environ.update(values)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # Ray leaves open files to the collector
            yield
            gc.collect()  # here, or it would find them where they are nobody's fault
    finally:
        for name in os.environ.keys() - before.keys():  # Flower and Ray set some themselves
            del os.environ[name]
        os.environ.update(before)
