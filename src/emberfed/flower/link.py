"""The link of a deployment: a server is the one task of a Flower run, and speaks to its SuperLink as that task.

A SuperLink that dies is started again on the same database and port, and what was under way goes on: messages and what
they carry are on its disk. Objects are moved one at a time, so a payload is in memory once.
"""

from __future__ import annotations

import hashlib
import io
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TypeVar, final

import httpx
from flwr.app import Message, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SubStatus
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    GetNodesRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TASK_TOKEN_HEADER, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.protobuf.client import (
    ProtobufCall,
    ProtobufClient,
    ProtobufClientInterceptor,
    ProtobufRequestContext,
)
from flwr.supercore.runtime import RuntimeHttpClient
from pydantic import Field

from emberfed.errors import EmberfedError, EngineError
from emberfed.events import Listener, Notice
from emberfed.flower.arriving import LARGEST_BYTES, Arriving, TooLarge
from emberfed.flower.certificates import server_files
from emberfed.flower.conversation import ConversationConfig, Lost
from emberfed.flower.server_process import SuperLinkProcess
from emberfed.flower.server_state import SECRET_HEADER, ServerState, Serving
from emberfed.flower.wire import as_line

T = TypeVar("T")
C = TypeVar("C", bound=ProtobufClient)

_US = Node(node_id=SUPERLINK_NODE_ID)
_HEARTBEAT_SECONDS = 10.0
_RETRY_SECONDS = 0.5
_CALL_SECONDS = 60.0
# After these a client may be asked again; all else is the client's own failure.
_AWAY = (ErrorCode.MESSAGE_UNAVAILABLE, ErrorCode.REPLY_MESSAGE_UNAVAILABLE, ErrorCode.NODE_UNAVAILABLE)
_APP = """\
[project]
name = "emberfed"
version = "1.0.0"

[tool.flwr.app]
publisher = "emberfed"

[tool.flwr.app.components]
serverapp = "emberfed:server"
clientapp = "emberfed:client"
"""


class DeploymentConfig(ConversationConfig):
    """Where clients reach the server, and how long they are waited for.

    Attributes:
        host: The interface to listen on; 0.0.0.0 is all of them.
        port: The port there.
        join_seconds: How long clients are waited for before the first round.
        grace_seconds: How long the SuperLink, and with it the clients' connections and what they are doing, outlives a
            server that was killed.
        largest_reply_bytes: What a client's reply may come to: so much of the server's disk and memory it may take.
    """

    host: str = "0.0.0.0"
    port: int = Field(9092, ge=1, le=65535)
    join_seconds: float = Field(300.0, ge=0)
    grace_seconds: float = Field(300.0, ge=0)
    largest_reply_bytes: int = Field(LARGEST_BYTES, ge=1)


def open_link(settings: DeploymentConfig, state: Path, certificates: Path | None, listen: Listener) -> SuperLinkLink:
    """Start a SuperLink, or find the one that runs in this state folder, and begin a run on it.

    Args:
        settings: Where clients reach it, and how long things are waited for.
        state: The server's state folder.
        certificates: The server's certificates and its clients' public keys; None: plain HTTP, and clients' names are
            believed.
        listen: Told when the SuperLink had to be started again.

    Raises:
        EngineError: if the certificates cannot be used, the port is taken, the SuperLink does not start, or serves
            something else.
        StorageError: if the state folder cannot be written.
    """
    if certificates is not None:
        server_files(certificates)
    folder = None if certificates is None else str(certificates.absolute())
    serving = Serving(settings.host, settings.port, folder, settings.grace_seconds)
    process = SuperLinkProcess(ServerState(state / "superlink"), serving)
    try:
        return SuperLinkLink(process, settings, listen)
    except BaseException:
        process.leave()
        raise


@final
class _RunOver(Exception):
    """The SuperLink no longer knows our run: it was away for longer than a run may be without its task."""


@final
@dataclass(frozen=True, slots=True)
class _Session:
    """A run of Flower's, whose task we are.

    Attributes:
        run: The run's id.
        token: What shows that the task is ours.
        port: Where the SuperLink listens for us.
        client: Who calls it there.
    """

    run: int
    token: str
    port: int
    client: RuntimeHttpClient


@final
@dataclass(slots=True)
class _Sent:
    """A message that is not answered yet.

    Attributes:
        node: Its node.
        activation: When that node last connected, as Flower tells it.
        until: When it is forgotten, on the monotonic clock, in seconds.
        arriving: Its reply, once that has begun to come.
        settled: Whether its node has answered in another message: a client is sent nothing more before it has settled
            what it was sent, so this one asks the same.
    """

    node: int
    activation: str
    until: float
    arriving: Arriving | None = None
    settled: bool = False


@final
class SuperLinkLink:
    """A run on a SuperLink, kept alive in both senses: its task gives signs of life, and its process is watched."""

    def __init__(self, process: SuperLinkProcess, settings: DeploymentConfig, listen: Listener) -> None:
        """Begin a run.

        Args:
            process: Our share in the SuperLink.
            settings: How long a SuperLink that does not answer is waited for, and how large replies may be.
            listen: Told when it had to be started again.

        Raises: EngineError, StorageError.
        """
        self._process = process
        self._patience_seconds = settings.patience_seconds
        self._largest_reply_bytes = settings.largest_reply_bytes
        self._listen = listen
        self._notices: SimpleQueue[str] = SimpleQueue()
        self._clients: list[ProtobufClient] = []
        self._changing = threading.Lock()
        self._closing = threading.Event()
        self._activations: Mapping[int, str] = {}
        self._sent: dict[str, _Sent] = {}
        self._session = self._begun(process.running().port)
        self._signs = threading.Thread(target=self._give_signs_of_life, name="link's heartbeat", daemon=True)
        self._signs.start()

    def nodes(self) -> Mapping[str, int]:
        """Return the Flower node of each client that is connected now, by client id."""
        found = self._in_run(lambda session: session.client.GetNodes(GetNodesRequest())).nodes
        self._activations = {node.node_id: node.last_activated_at for node in found}
        return {node.name: node.node_id for node in found}

    def push(self, node: int, content: RecordDict, ttl_seconds: float) -> str:
        """Send to a node; return the message's id.

        Raises: EngineError.
        """
        self._in_run(lambda session: self._withdraw_old())  # noqa: ARG005
        if node not in self._activations:
            self.nodes()
        return self._in_run(lambda session: self._push(session, node, content, ttl_seconds))

    def pull(self, message: str) -> RecordDict | Lost | None:
        """Return a message's reply, why there will be none, or nothing if there is none yet.

        Raises: EngineError, StorageError.
        """
        sent = self._sent.get(message)
        if sent is None:
            return Lost("the SuperLink lost the run that the message was sent in", away=True)
        try:
            answer = self._pull(message, sent)
            if answer is not None:
                self._withdraw(message)
        except _RunOver:
            self._renew()
            return Lost("the SuperLink lost the run that the message was sent in", away=True)
        if isinstance(answer, RecordDict):
            for other in self._sent.values():
                other.settled = other.settled or other.node == sent.node
        return answer

    def close(self) -> None:
        """End the run, and the SuperLink if no other server has it. Safe to call twice."""
        if self._closing.is_set():
            return
        self._closing.set()
        self._signs.join()
        with suppress(httpx.HTTPError):
            self._session.client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED, details=""))
        for message in list(self._sent):
            self._forget(message)
        for client in self._clients:
            client.close()
        self._process.leave()

    def _push(self, session: _Session, node: int, content: RecordDict, ttl_seconds: float) -> str:
        metadata = Metadata(session.run, "", SUPERLINK_NODE_ID, node, "", "", time.time(), ttl_seconds, "query")
        message = make_message(metadata, content)
        with no_object_id_recompute():
            message_id: str = message.object_id
            metadata.__dict__["_message_id"] = message_id
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(remove_content_from_message(message))],
                message_object_trees=[get_object_tree(message)],
            )
            taken = self._handed_over(request, get_all_nested_objects(message))
        if taken == [message_id]:  # else Flower knows no such node any more
            until = time.monotonic() + ttl_seconds
            self._sent[message_id] = _Sent(node, self._activations.get(node, ""), until)
        return message_id

    def _handed_over(self, request: PushAppMessagesRequest, objects: Mapping[str, InflatableObject]) -> Sequence[str]:
        """Push a message with its objects; return its id, or nothing. Raises: EngineError if it cannot be kept."""
        until: float | None = None
        # All of it may be repeated: what is known by its content is stored once.
        while True:
            answer = self._call(lambda session: session.client.PushMessages(request))
            missing = [(one, objects[one]) for one in answer.objects_to_push]
            if all(self._push_object(answer.session_id, one, found.deflate()) for one, found in missing):
                return list(answer.message_ids)
            until = time.monotonic() + self._patience_seconds if until is None else until
            if time.monotonic() >= until:
                raise EngineError(
                    f"the SuperLink of {self._process.state.root} could not keep a message for "
                    f"{self._patience_seconds:g} s (engine.patience_seconds): make room if its disk is full; "
                    f"{self._process.state.log} says why, and ends with: {self._process.last_line()}"
                )
            time.sleep(_RETRY_SECONDS)

    def _push_object(self, push_session: str, object_id: str, content: bytes) -> bool:
        def push(session: _Session) -> bool:
            request = PushObjectRequest(
                node=_US, run_id=session.run, object_id=object_id, object_content=content, session_id=push_session
            )
            return session.client.PushObject(request).stored

        return self._call(push)

    def _pull(self, message: str, sent: _Sent) -> RecordDict | Lost | None:
        if sent.arriving is None:
            reply = self._replied(message, sent)
            if reply is None:
                restarted = self._activations.get(sent.node, sent.activation) != sent.activation
                return Lost("its node connected anew, and has forgotten the message", away=True) if restarted else None
            if reply.has_error():
                return _lost(reply)
        assert sent.arriving is not None
        try:
            return sent.arriving.content()
        except _BrokenOff:
            return Lost("its upload broke off", away=True)
        except TooLarge as error:
            told = f"its reply has {error}; engine.largest_reply_bytes is {self._largest_reply_bytes}"
            return Lost(as_line(told), away=False)
        except ValueError as error:
            return Lost(as_line(f"its reply is none of Flower's messages: {error}"), away=False)

    def _replied(self, message: str, sent: _Sent) -> Message | None:
        """Return the reply without its content, which arrives from now on, or None if there is none yet."""
        request = PullAppMessagesRequest(message_ids=[message])
        answer = self._call(lambda session: session.client.PullMessages(request))
        if not answer.messages_list:
            return None
        reply = message_from_proto(answer.messages_list[0])
        root, most = self._process.state.root, self._largest_reply_bytes
        sent.arriving = Arriving(reply.metadata.message_id, self._fetched, root, most)
        return reply

    def _fetched(self, object_id: str) -> bytes | None:
        def fetch(session: _Session) -> PullObjectResponse:
            return session.client.PullObject(PullObjectRequest(node=_US, run_id=session.run, object_id=object_id))

        answer = self._call(fetch)
        if not answer.object_found:
            raise _BrokenOff
        return answer.object_content if answer.object_available else None

    def _withdraw_old(self) -> None:
        """Withdraw what nobody waits for: messages that are past their time, and those that were answered twice."""
        now = time.monotonic()
        for message, sent in list(self._sent.items()):
            if sent.until < now or (sent.settled and self._replied(message, sent) is not None):
                self._withdraw(message)

    def _withdraw(self, message: str) -> None:
        """Forget a message, and have the SuperLink forget what it keeps of it and of its reply."""

        def confirm(session: _Session) -> None:
            for one in kept:
                request = ConfirmMessageReceivedRequest(node=_US, run_id=session.run, message_object_id=one)
                session.client.ConfirmMessageReceived(request)

        arriving = self._sent[message].arriving
        kept = [message] if arriving is None else [message, arriving.message]
        self._call(confirm)
        self._forget(message)

    def _forget(self, message: str) -> None:
        sent = self._sent.pop(message)
        if sent.arriving is not None:
            sent.arriving.drop()

    def _in_run(self, do: Callable[[_Session], T]) -> T:
        """Do something in the present run, or in another if that one is over."""
        while True:
            try:
                return self._call(do)
            except _RunOver:
                self._renew()

    def _call(self, do: Callable[[_Session], T]) -> T:
        """Call the SuperLink, and again while it is away.

        Raises:
            EngineError: if it is away for too long, or refuses.
            _RunOver: if it does not know the run.
        """
        until: float | None = None
        while True:
            self._tell()
            session = self._session
            try:
                return do(session)
            except httpx.HTTPStatusError as error:
                problem = _refusal(error)
            except httpx.TransportError as error:
                problem = f"it does not answer ({error})"
            until = time.monotonic() + self._patience_seconds if until is None else until
            problem = self._recovered(session) or problem
            if time.monotonic() >= until:
                raise EngineError(
                    f"the SuperLink of {self._process.state.root} was away for {self._patience_seconds:g} s "
                    f"(engine.patience_seconds): {problem}; its last words: {self._process.last_line()}"
                )
            time.sleep(_RETRY_SECONDS)

    def _recovered(self, failed: _Session) -> str | None:
        """See that the SuperLink is alive, and call it where it is now; return what is wrong if that cannot be."""
        with self._changing:
            try:
                port = self._process.running().port
            except EngineError as error:
                return str(error)
            if port != self._session.port and self._session is failed:
                self._session = replace(failed, port=port, client=self._runtime(port, failed.token))
                self._notices.put(
                    "the SuperLink was gone and has been started again; clients connect to it by themselves"
                )
            return None

    def _renew(self) -> None:
        """Begin another run; what was sent in the old one is lost."""
        for message in list(self._sent):
            self._forget(message)
        with self._changing:
            self._session = self._begun(self._process.running().port)
        self._notices.put("the SuperLink had given up the run on it; clients are asked again")

    def _begun(self, port: int) -> _Session:
        """Start a run and claim its task. Raises: EngineError."""
        told = [_Told(SECRET_HEADER, self._process.state.secret())]
        control, runtime = _client(ControlHttpClient, port, told), _client(RuntimeHttpClient, port, told)
        app = _app()
        try:
            with self._process.starting():  # or another server might claim our task, and we its
                fab = Fab(hash_str=hashlib.sha256(app).hexdigest(), content=app)
                run = control.StartRun(StartRunRequest(fab=fab)).run_id
                token = ""
                while not token:
                    claimed = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP]))
                    if not claimed.token:
                        raise EngineError(f"Flower did not start a run: {self._process.last_line()}")
                    if claimed.task.run_id == run:
                        token = claimed.token
                    # Any other is of a server that died just here; claimed by nobody who goes on, it expires.
            client = self._runtime(port, token)
            client.PullTaskInput(PullTaskInputRequest())
        except httpx.HTTPError as error:
            raise EngineError(f"Flower did not start a run: {error}; {self._process.last_line()}") from error
        finally:
            control.close()
            runtime.close()
        return _Session(run, token, port, client)

    def _runtime(self, port: int, token: str) -> RuntimeHttpClient:
        told = [_Told(SECRET_HEADER, self._process.state.secret()), _Told(TASK_TOKEN_HEADER, token)]
        client = _client(RuntimeHttpClient, port, told)
        self._clients.append(client)
        return client

    def _give_signs_of_life(self) -> None:
        while not self._closing.wait(_HEARTBEAT_SECONDS):
            session = self._session
            # Whoever uses the link next hears of it; here, the next sign may find it mended.
            with suppress(httpx.HTTPStatusError, EmberfedError, OSError):
                try:
                    session.client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
                except httpx.TransportError:
                    self._recovered(session)

    def _tell(self) -> None:
        with suppress(Empty):
            while True:
                self._listen(Notice("warning", self._notices.get_nowait()))


@final
class _BrokenOff(Exception):
    """An object is not there, and will not come."""


@final
@dataclass(frozen=True, slots=True)
class _Told:
    """A header of every call."""

    name: str
    value: str

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Add it."""
        context.request.headers[self.name] = self.value
        return call_next(context)


def _client(kind: type[C], port: int, told: Sequence[ProtobufClientInterceptor]) -> C:
    """Return a client of the SuperLink on this machine, which no proxy is between."""
    client = kind(f"http://127.0.0.1:{port}", interceptors=told)
    client.close()
    client._client = httpx.Client(timeout=_CALL_SECONDS, trust_env=False)
    return client


def _refusal(error: httpx.HTTPStatusError) -> str:
    """Return why a call failed that may be repeated. Raises: EngineError, _RunOver if it may not."""
    status = error.response.status_code
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        raise _RunOver from error
    said = " ".join(error.response.text[:300].split())
    if status < httpx.codes.INTERNAL_SERVER_ERROR:
        raise EngineError(f"the SuperLink refused {error.request.url.path}: {status} {said}") from error
    return f"it fails with {status} {said}"


def _lost(reply: Message) -> Lost:
    """Return why there is no reply, of Flower's reasons."""
    reason = as_line(reply.error.reason or f"error {reply.error.code} of Flower's")
    return Lost(reason, away=reply.error.code in _AWAY)


def _app() -> bytes:
    """Return Flower's app bundle of a run, which it wants one of; no code is in it, and nodes run none that is sent."""
    bundle = io.BytesIO()
    with zipfile.ZipFile(bundle, "w") as archive:
        archive.writestr(zipfile.ZipInfo("pyproject.toml"), _APP)
    return bundle.getvalue()
