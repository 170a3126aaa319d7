"""A client of a federation: one process in which model and data are loaded once, and a SuperNode beside it.

This process takes tasks from the SuperNode, has a `Desk` answer them, and gives the answers back. The SuperNode is
started here, watched by a thread, and started again when it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import queue
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, final

import httpx
from flwr.app import Error, Message, RecordDict
from flwr.app.message import remove_content_from_message
from flwr.common.constant import ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_push_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError, ObjectPushError
from flwr.supercore.interceptors import RuntimeTokenHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient

from emberfed import storage
from emberfed.errors import EmberfedError, EngineError, StorageError
from emberfed.flower import certificates, reach
from emberfed.flower.arriving import Arriving
from emberfed.flower.environment import environment
from emberfed.flower.order import Order

_POLL_SECONDS = 0.1
_PAUSE_SECONDS = 1.0  # between attempts to connect
_STOP_SECONDS = 8.0  # more than a SuperNode takes to end
_VAIN_STARTS = 3  # SuperNodes in a row that end without a word before we give up
_LONGEST_REASON = 500


class Desk(Protocol):
    """Who answers a server's questions."""

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer one question. Whatever it raises is told to the server as this question's failure."""
        ...

    def rest(self) -> None:
        """Do what there is to do after an answer, while the server goes on. Raises: StorageError."""
        ...


@final
@dataclass(frozen=True, slots=True)
class NodeSettings:
    """What a client needs to take part.

    Attributes:
        server: `host:port`, as the server's certificate names the host.
        certificates: The folder that `emberfed certificates` made for this client; None: plain HTTP, and anyone may be
            the server or listen.
        name: The client's name, for its own messages.
        state: A folder of the client's own, which it finds again when it is started again.
        patience_seconds: How long a server that cannot be reached is waited for.
    """

    server: str
    certificates: Path | None
    name: str
    state: Path
    patience_seconds: float


@final
@dataclass(frozen=True, slots=True)
class Connected:
    """The server has taken the client in, or is back."""

    server: str


@final
@dataclass(frozen=True, slots=True)
class Waiting:
    """There is no connection at present; attempts go on."""

    reason: str


@final
@dataclass(frozen=True, slots=True)
class Answered:
    """A question is done with: `problem` says why there was no good answer (None: there was one)."""

    seconds: float
    problem: str | None


@final
@dataclass(frozen=True, slots=True)
class Unrested:
    """What there was to do after an answer could not be finished; it is done again when it is needed."""

    reason: str


NodeEvent = Connected | Waiting | Answered | Unrested
NodeListener = Callable[[NodeEvent], None]


def serve(settings: NodeSettings, desk: Desk, listen: NodeListener) -> None:
    """Answer a server's questions until an exception (KeyboardInterrupt, say) ends it.

    Args:
        settings: Where the server is, and who the client is.
        desk: Who answers.
        listen: Is told what happens, between answers.

    Raises:
        EngineError: If the server cannot be reached for `patience_seconds`, or does not let this client in.
        ConfigError: If the address is not one.
        StorageError: If the state folder cannot be written.
    """
    reach.host_and_port(settings.server)
    with _alone(settings.state), _Connection(settings) as connection:
        while True:
            for event in connection.news():
                listen(event)
            door = connection.door()
            if door is None or not _answer_one(door, desk, listen, settings.state):
                time.sleep(_POLL_SECONDS)


def check(settings: NodeSettings) -> None:
    """Look for what waiting does not mend: files that cannot be used, an address that is none, another's server.

    Raises: EngineError, ConfigError.
    """
    files = None if settings.certificates is None else certificates.client_files(settings.certificates)
    problem = reach.problem(settings.server, None if files is None else files.ca)
    if problem is not None and problem.lasting:
        raise EngineError(problem.reason)


@final
class _Door:
    """Where a SuperNode hands out tasks, and to whom."""

    def __init__(self, port: int, secret: bytes) -> None:
        """Take where it is; nothing is connected for longer than a call."""
        self._address = f"http://127.0.0.1:{port}"
        signed = SuperExecAuthHttpInterceptor(
            master_secret=secret, protected_methods=("/flwr.proto.Runtime/AcquireTask",)
        )
        self._taker = _Direct(self._address, interceptors=[signed])

    @contextlib.contextmanager
    def client(self, interceptor: ProtobufClientInterceptor) -> Iterator[RuntimeHttpClient]:
        """Give a client of the Runtime API."""
        client = _Direct(self._address, interceptors=[interceptor])
        try:
            yield client
        finally:
            client.close()

    def take(self) -> str | None:
        """Return the token of the task that waits longest; None: there is none, or no SuperNode any more."""
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        with contextlib.suppress(httpx.HTTPError):
            return self._taker.AcquireTask(request).token or None
        return None


@final
class _Direct(RuntimeHttpClient):
    """Flower's client of the Runtime API, deaf to the environment's proxies.

    It is plain HTTP on the loopback: certificates, which take long to load, are none of its business.
    """

    def __init__(self, base_url: str, **arguments: Any) -> None:
        super().__init__(base_url, verify=False, **arguments)
        self._client.close()
        self._client = httpx.Client(
            trust_env=False, verify=False, timeout=30.0, limits=httpx.Limits(max_keepalive_connections=0)
        )


def _answer_one(door: _Door, desk: Desk, listen: NodeListener, folder: Path) -> bool:
    """Answer a question, if there is one. Returns False if not."""
    token = door.take()
    if token is None:
        return False
    begun = time.monotonic()
    try:
        with door.client(RuntimeTokenHttpInterceptor(token)) as client, _beating(client):
            problem = _answer(client, desk, folder)
    except (httpx.HTTPError, ObjectPullError, ObjectPushError) as error:
        problem = f"the SuperNode ended meanwhile, and the server asks again ({type(error).__name__})"
    listen(Answered(time.monotonic() - begun, problem))
    try:
        desk.rest()
    except StorageError as error:  # room may have been made before the next question
        listen(Unrested(str(error)))
    return True


def _answer(client: RuntimeHttpClient, desk: Desk, folder: Path) -> str | None:
    """Answer one task's question. Returns why there was no good answer; None: there was one."""
    node = Node(node_id=client.PullTaskInput(PullTaskInputRequest()).context.node_id)
    question = _question(client)
    try:
        content = _content(client, question, node, folder)
    except (StorageError, ValueError, LookupError, TypeError) as error:
        reply = _failure(error, question)
    else:
        reply = _reply(desk, content, question)
    _push(client, reply, node)
    client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
    return reply.error.reason if reply.has_error() else None


def _reply(desk: Desk, content: RecordDict, question: Message) -> Message:
    try:
        return Message(desk.answer(content), reply_to=question)
    except Exception as error:
        return _failure(error, question)


def _failure(error: Exception, question: Message) -> Message:
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_REASON]
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=question)


def _question(client: RuntimeHttpClient) -> Message:
    """Return a task's question without its content. Raises: ObjectPullError."""
    told = client.PullMessages(PullAppMessagesRequest()).messages_list
    if not told:
        raise ObjectPullError("", "the SuperNode has no message for its task")
    return message_from_proto(told[0])


def _content(client: RuntimeHttpClient, question: Message, node: Node, folder: Path) -> RecordDict:
    """Return a question's content, of whose payload there is one copy. Raises: ObjectPullError, StorageError."""
    run_id, message_id = question.metadata.run_id, question.metadata.message_id

    def fetch(object_id: str) -> bytes | None:
        answer = client.PullObject(PullObjectRequest(node=node, run_id=run_id, object_id=object_id))
        return answer.object_content if answer.object_available else None

    arriving = Arriving(message_id, fetch, folder)
    try:
        content = arriving.content()
    finally:
        arriving.drop()
    if content is None:
        raise ObjectPullError(message_id, "the SuperNode does not have all of it")
    client.ConfirmMessageReceived(ConfirmMessageReceivedRequest(node=node, run_id=run_id, message_object_id=message_id))
    return content


def _push(client: RuntimeHttpClient, reply: Message, node: Node) -> None:
    """Hand over an answer, one object after the other: Flower's own way holds them all. Raises: ObjectPushError."""
    reply.metadata.__dict__["_message_id"] = reply.object_id
    with no_object_id_recompute():
        told = client.PushMessages(
            PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
            )
        )
        lacking = set(told.objects_to_push)
        send = make_push_object_fn_protobuf(client.PushObject, node, reply.metadata.run_id, told.session_id)
        for object_id, part in get_all_nested_objects(reply).items():
            if object_id in lacking:
                send(object_id, part.deflate())


@contextlib.contextmanager
def _beating(client: RuntimeHttpClient) -> Iterator[None]:
    """Tell the SuperNode that its task is being worked on, however long that takes."""

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False
        except httpx.HTTPError:
            return True  # the task was given up; pushing its answer will tell
        return True

    sender = HeartbeatSender(beat)
    sender.start()
    try:
        yield
    finally:
        sender.stop()


@contextlib.contextmanager
def _alone(state: Path) -> Iterator[None]:
    """Keep a second client out of a state folder. Raises: EngineError, StorageError."""
    with storage.explained(state):
        state.mkdir(parents=True, exist_ok=True)
        lock = (state / "client.lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EngineError(f"another client runs with the folder {state}; stop it, or choose another") from None
        yield


@final
class _Connection:
    """Keeps a SuperNode running, from a thread of its own."""

    def __init__(self, settings: NodeSettings) -> None:
        self._settings = settings
        self._files = None if settings.certificates is None else certificates.client_files(settings.certificates)
        self._news: queue.SimpleQueue[NodeEvent | EmberfedError] = queue.SimpleQueue()
        self._door: _Door | None = None
        self._stopping = threading.Event()
        self._process: subprocess.Popen[str] | None = None
        self._handling = threading.Lock()  # of the process: nobody starts one that `__exit__` would miss
        self._waiting_since: float | None = time.monotonic()
        self._last_reason = ""
        self._thread = threading.Thread(target=self._watch, name="supernode", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._handling:
            self._stopping.set()
            process = self._process
        if process is not None and process.stdin is not None:
            with contextlib.suppress(OSError):
                process.stdin.close()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._thread.join()

    def door(self) -> _Door | None:
        """Return where tasks are; None while no SuperNode is connected."""
        return self._door

    def news(self) -> Iterator[NodeEvent]:
        """Give what has happened since it was last asked. Raises: EngineError, StorageError if it is given up."""
        while not self._news.empty():
            event = self._news.get()
            if isinstance(event, EmberfedError):
                raise event
            yield event

    def _watch(self) -> None:
        try:
            self._keep_running()
        except EmberfedError as error:
            self._news.put(error)
        except Exception as error:
            self._news.put(EngineError(f"the SuperNode could not be kept running: {type(error).__name__}: {error}"))

    def _keep_running(self) -> None:
        vain = 0
        while not self._stopping.is_set():
            problem = self._problem()
            if problem is not None:
                self._wait_for(problem)
                continue
            connected = self._run()
            vain = 0 if connected else vain + 1
            if vain >= _VAIN_STARTS:
                raise EngineError(f"the SuperNode cannot start: {self._last_line()}; all of it is in {self._log}")
            if not self._stopping.is_set():
                self._wait_for(reach.Problem("the connection was lost", False))

    def _problem(self) -> reach.Problem | None:
        return reach.problem(self._settings.server, None if self._files is None else self._files.ca)

    def _wait_for(self, problem: reach.Problem) -> None:
        """Tell why there is no connection, and pause. Raises: EngineError if that is not worth it."""
        if problem.lasting:
            raise EngineError(problem.reason)
        now = time.monotonic()
        since = self._waiting_since = self._waiting_since or now
        if now - since >= self._settings.patience_seconds:
            raise EngineError(f"{problem.reason} (waited {now - since:.0f} seconds)")
        self._tell_waiting(problem.reason)
        self._stopping.wait(_PAUSE_SECONDS)

    def _tell_waiting(self, reason: str) -> None:
        if reason != self._last_reason:
            self._last_reason = reason
            self._news.put(Waiting(reason))

    def _run(self) -> bool:
        """Start a SuperNode and follow it to its end. Returns whether it was connected. Raises: EngineError."""
        secret = secrets.token_bytes(32)
        process = self._start()
        if process is None:
            return True
        connected = False
        try:
            with process:
                assert process.stdin is not None
                assert process.stdout is not None
                with contextlib.suppress(OSError):  # it ended already
                    process.stdin.write(self._order(secret).line())
                    process.stdin.flush()
                for line in process.stdout:
                    connected = self._hear(json.loads(line), secret) or connected
            return connected
        finally:
            self._door = None

    def _start(self) -> subprocess.Popen[str] | None:
        with self._handling:
            if self._stopping.is_set():
                return None
            with storage.explained(self._log), self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "emberfed.flower.supernode"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment(self._settings.state / "flower"),
                    start_new_session=True,  # Ctrl-C is for us; it is ended by closing its input
                )
            return self._process

    def _order(self, secret: bytes) -> Order:
        state = self._settings.state.absolute()
        return Order(
            server=self._settings.server,
            ca=None if self._files is None else str(self._files.ca),
            key=str(certificates.own_key(state / "client.key") if self._files is None else self._files.key),
            introduced_as=self._settings.name if self._files is None else None,
            memory=str(state / "node.json"),
            secret=secret.hex(),
            patience_seconds=self._settings.patience_seconds,
        )

    def _hear(self, event: dict[str, Any], secret: bytes) -> bool:
        """Take in what a SuperNode tells. Returns whether it is connected. Raises: EngineError."""
        match event["kind"]:
            case "connected":
                self._door = _Door(event["port"], secret)
                self._met()
                return True
            case "back":
                self._met()
            case "away":
                self._waiting_since = self._waiting_since or time.monotonic()
                self._tell_waiting(f"{self._settings.server} does not answer ({event['reason']})")
            case "gone":
                problem = self._problem()
                if problem is not None:
                    self._wait_for(problem)
                else:
                    self._waiting_since = None
                    self._tell_waiting(f"{self._settings.server} did not answer ({event['reason']})")
            case "refused":
                raise EngineError(f"{self._settings.server}: {event['reason']}")
        return False

    def _met(self) -> None:
        self._waiting_since, self._last_reason = None, ""
        self._news.put(Connected(self._settings.server))

    @property
    def _log(self) -> Path:
        return self._settings.state / "supernode.log"

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
