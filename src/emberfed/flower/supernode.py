"""A client's SuperNode: the process that stays connected to the server while another one computes.

`python -m emberfed.flower.supernode` reads an `Order` from its standard input, tells what happens as lines of JSON on
its standard output, and ends when its input does: so it never outlives the process that started it, however that ended.

It speaks Flower's Fleet API with the server and serves Flower's Runtime API on a loopback port, where whoever knows the
secret takes tasks. Flower's own SuperNode does the same with polls of 3 s, and forgets a reply whose upload failed. No
code of the server's is fetched.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, final

import flwr
import httpx
import uvicorn
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, ErrorCode, Status
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PullMessagesResponse,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PullObjectRequest
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.node_pb2 import Node
from flwr.supercore.constant import TaskType
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    ObjectPushError,
    pull_objects,
    push_object_contents_from_iterable,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.run import Run
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.main import create_app
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from emberfed import storage
from emberfed.errors import EngineError
from emberfed.flower.certificates import read_private_key
from emberfed.flower.introduction import Introduction, introduce
from emberfed.flower.order import Order

_SHORTEST_POLL_SECONDS = 0.1
_LONGEST_POLL_SECONDS = 0.5
_UNFINISHED = (Status.PENDING, Status.STARTING, Status.RUNNING)
_GRACE_SECONDS = 5
_RETRY_SECONDS = 2.0  # between attempts to hand over what the server has no room for

Tell = Callable[[Mapping[str, Any]], None]


@final
class Refused(Exception):
    """The server, or the way to it, does not let this node in; waiting does not help."""


@final
class Away(Exception):
    """The server did not answer for as long as it is waited for, or does not know this node any more."""


@final
class Fleet:
    """The server, as one node talks to it. A call that finds the server away is repeated until it is back."""

    def __init__(self, order: Order, key: ec.EllipticCurvePrivateKey, tell: Tell) -> None:
        """Connect nothing yet.

        Args:
            order: Where the server is, and how long it may be away.
            key: What requests are signed with.
            tell: Is told when the server goes away and comes back.
        """
        self._order = order
        self._tell = tell
        self._key = public_key_to_bytes(key.public_key())
        self._client = FleetHttpClient.from_server_address(
            order.server,
            order.ca is None,
            None if order.ca is None else Path(order.ca).read_bytes(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
        )
        # What answers for the server must not make us call others, inside the network we are in.
        self._client._client.follow_redirects = False
        self._memory = Path(order.memory)
        self._in_hand: bytes | None = None
        self._away = threading.Event()
        self._joining = threading.Lock()  # a heartbeat in the middle of it would make the server refuse us
        self._unheard = False
        self.node = Node()

    def join(self) -> None:
        """Become a node of the server's, and tell it what was lost when this one was last killed.

        Raises: Refused, Away, StorageError.
        """
        with self._joining:
            self._leave_earlier()
            self._activate()
        self._give_up()
        self._remember(None)
        self._unheard = False

    def _activate(self) -> None:
        try:
            if self._order.introduced_as is not None:
                introduction = Introduction(self._order.introduced_as, self._key)
                self._patiently(lambda who: introduce(self._order.server, who), introduction)
            request = ActivateNodeRequest(public_key=self._key, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            self.node = Node(node_id=self._patiently(self._client.ActivateNode, request).node_id)
        except EngineError as error:
            raise Refused(str(error)) from error
        except httpx.HTTPStatusError as error:
            raise Refused(_refusal(error)) from error

    def leave(self) -> None:
        """Tell the server at once; if it is away, it finds out by itself."""
        try:
            self._give_up()
            self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
        except (httpx.HTTPError, RuntimeError, Away):
            return

    def beat(self) -> bool:
        """Tell the server that this node lives; False: not heard."""
        with self._joining:
            request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
            try:
                return bool(self._client.SendNodeHeartbeat(request).success)
            except (httpx.HTTPError, RuntimeError):
                return False

    def pull(self) -> tuple[Message, ObjectTree] | None:
        """Return the oldest message for this node, without its content, and what the content is made of.

        It is in hand from now until `settled`. The server gives each away once: if an answer of its got lost, and
        perhaps a message in it, this node joins anew, which the server sees, and it asks again.

        Raises: Refused, Away, StorageError.
        """
        response = self._patiently(self._pull_once, PullMessagesRequest(node=self.node))
        if not response.messages_list:
            if self._unheard:
                self.join()
            return None
        self._remember(response.messages_list[0].SerializeToString())
        return message_from_proto(response.messages_list[0]), response.message_object_trees[0]

    def settled(self) -> None:
        """Forget the message in hand: it is answered, or nobody waits for an answer. Raises: StorageError."""
        self._remember(None)

    def pull_contents(self, run_id: int, object_ids: list[str]) -> dict[str, bytes]:
        """Return objects by their ids. Raises: ObjectPullError, Away."""
        fetch = make_pull_object_fn_protobuf(self._bound(self._client.PullObject), self.node, run_id)
        # What is not there yet is on its way: the server sees a message before all of its objects.
        return pull_objects(object_ids, fetch, initial_backoff=0.05, backoff_cap=1.0)

    def confirm(self, run_id: int, message_id: str) -> None:
        """Tell that a message has come with all its objects."""
        request = ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=message_id)
        self._patiently(self._client.ConfirmMessageReceived, request)

    def push(self, message: Message, tree: ObjectTree, seconds: float, content: Callable[[str], bytes]) -> None:
        """Send a message without its content, then those of its objects that the server lacks.

        An object that it cannot keep (its disk is full, say) is sent again: the message is not, since Flower takes none
        once the server has looked for it.

        Raises:
            ObjectPushError: If the server does not take them, for as long as it is waited for.
            Away: If the server is gone.
        """
        until = time.monotonic() + self._order.patience_seconds
        response = self._patiently(
            self._client.PushMessages,
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(message)],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            ),
        )
        run_id, lacking = message.metadata.run_id, set(response.objects_to_push)
        push = make_push_object_fn_protobuf(
            self._bound(self._client.PushObject), self.node, run_id, response.session_id
        )
        if not lacking:  # it takes no answer any more, or the answer to the same call got lost
            raise ObjectPushError(tree.object_id, run_id, response.session_id)

        def send(object_id: str, part: bytes) -> None:
            while True:
                try:
                    return push(object_id, part)
                except ObjectPushError:
                    here = self._here(run_id, object_id)
                    if here is None or (not here and time.monotonic() >= until):
                        raise
                if here:  # the answer to an earlier call got lost
                    return None
                time.sleep(_RETRY_SECONDS)

        ids = dict.fromkeys(part.object_id for part in iterate_object_tree(tree) if part.object_id in lacking)
        push_object_contents_from_iterable(((id_, content(id_)) for id_ in ids), send)

    def withdraw(self, message: Message) -> None:
        """Take back a reply that the server may have a part of: it finds that gone, and asks again.

        An error instead of it would be refused: Flower takes one reply to a message.
        """
        run_id, message_id = message.metadata.run_id, message.metadata.message_id
        with suppress(httpx.HTTPError):  # then it finds out when the upload expires
            self._client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=message_id)
            )

    def _pull_once(self, request: PullMessagesRequest) -> PullMessagesResponse:
        try:
            return self._client.PullMessages(request)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise  # it was never sent
        except (httpx.TransportError, httpx.HTTPStatusError):
            self._unheard = True
            raise

    def _here(self, run_id: int, object_id: str) -> bool | None:
        """Return whether the server has an object; None if it does not expect it any more."""
        request = PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id)
        found = self._patiently(self._client.PullObject, request)
        return bool(found.object_available) if found.object_found else None

    def _leave_earlier(self) -> None:
        """Take leave of what this node was before: it would count as connected for a minute. Raises: Away."""
        try:
            memory = json.loads(self._memory.read_bytes())
            earlier, in_hand = int(memory["node"]), bytes.fromhex(memory["in_hand"])
        except (OSError, ValueError, KeyError, TypeError):
            return
        try:
            self._patiently(self._client.DeactivateNode, DeactivateNodeRequest(node_id=earlier))
        except httpx.HTTPStatusError:
            return  # it was not connected, or is another server's
        self._in_hand = in_hand

    def _give_up(self) -> None:
        """Tell the server that the message in hand will not be answered: a short death goes unnoticed. Raises: Away."""
        if not self._in_hand:
            return
        error = Error(ErrorCode.MESSAGE_UNAVAILABLE, "the client's SuperNode ended before the answer was sent")
        reply = Message(error, reply_to=message_from_proto(MessageProto.FromString(self._in_hand)))
        reply.metadata.__dict__["_message_id"] = reply.object_id
        parts = get_all_nested_objects(reply)
        with suppress(httpx.HTTPStatusError, ObjectPushError):  # nobody waits for it any more
            self.push(reply, get_object_tree(reply), 0.0, lambda id_: parts[id_].deflate())

    def _remember(self, in_hand: bytes | None) -> None:
        self._in_hand = in_hand
        storage.put(self._memory, json.dumps({"node": self.node.node_id, "in_hand": (in_hand or b"").hex()}).encode())

    def _bound(self, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda request: self._patiently(call, request)

    def _patiently(self, call: Callable[[Any], Any], request: Any) -> Any:
        invoker = RetryInvoker(
            lambda: exponential(base_delay=0.2, max_delay=2),
            (httpx.TransportError, httpx.HTTPStatusError),
            max_tries=None,
            max_time=self._order.patience_seconds,
            should_giveup=_is_final,
            on_backoff=lambda state: self._went(state.exception),
        )
        try:
            result = invoker.invoke(call, request)
        except httpx.TransportError as error:
            raise Away(str(error)) from error
        if self._away.is_set():
            self._away.clear()
            self._tell({"kind": "back"})
        return result

    def _went(self, error: Exception | None) -> None:
        if not self._away.is_set():
            self._away.set()
            self._tell({"kind": "away", "reason": f"{type(error).__name__}: {error}"})


@final
class Office:
    """Takes messages from the server into the state that the Runtime API shows, and replies out of it."""

    def __init__(self, fleet: Fleet, state: NodeState) -> None:
        """Take both sides."""
        self._fleet = fleet
        self._state = state
        self._store = state.object_store
        # Flower hands its app's code to whoever takes a task. There is none here: the taker has its own.
        self._code = Fab(hashlib.sha256(b"").hexdigest(), b"", {})
        state.store_fab(self._code)

    def receive(self) -> bool:
        """Take one message, whole, and make a task of it; False: there is none. Raises: Away."""
        pulled = self._fleet.pull()
        if pulled is None:
            return False
        message, tree = pulled
        run_id, message_id = message.metadata.run_id, message.metadata.message_id
        self._learn(run_id)
        lacking = self._store.preregister(run_id, tree)
        try:
            contents = self._fleet.pull_contents(run_id, lacking)
            for id_ in list(contents):
                self._store.put(id_, contents.pop(id_))
            self._fleet.confirm(run_id, message_id)
        except (ObjectPullError, httpx.HTTPStatusError) as error:
            print(f"message {message_id} was withdrawn: {error}", file=sys.stderr, flush=True)
            self._store.delete(message_id)
            self._fleet.settled()
            return False
        self._state.store_message(message)
        self._state.create_task(TaskType.CLIENT_APP, run_id, fab_hash=self._code.hash_str)
        return True

    def wait(self) -> None:
        """Return when nobody works on a task any more. A taker that fell silent has failed, after a minute."""
        while self._state.get_tasks(statuses=_UNFINISHED):
            time.sleep(0.05)

    def send(self) -> None:
        """Send all replies there are. Raises: Away."""
        for message in self._state.get_messages_legacy(is_reply=True):
            message_id, asked_id = message.metadata.message_id, message.metadata.reply_to_message_id
            tree = self._store.get_object_tree(message_id)
            seconds = self._state.get_message_processing_duration(asked_id)
            try:
                self._push(message, tree, seconds)
            finally:
                self._state.delete_messages(message_ids=[message_id, asked_id])
                self._store.delete(message_id)
                self._store.delete(asked_id)  # still there if whoever took the task could not keep it
        self._fleet.settled()

    def _push(self, message: Message, tree: ObjectTree, seconds: float) -> None:
        """Send a reply, or see to it that the server does not wait for it. Raises: Away, httpx.HTTPStatusError."""
        try:
            self._fleet.push(message, tree, seconds, self._content)
        except ObjectPushError as error:
            print(f"reply {message.metadata.message_id} is taken back: {error}", file=sys.stderr, flush=True)
            self._fleet.withdraw(message)
        except httpx.HTTPStatusError as error:
            if error.response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
                raise
            print(f"reply {message.metadata.message_id} is refused: {error}", file=sys.stderr, flush=True)

    def _content(self, object_id: str) -> bytes:
        content = self._store.get(object_id)
        if content is None:
            raise RuntimeError(f"object {object_id} of a reply is gone")
        return content

    def _learn(self, run_id: int) -> None:
        if self._state.get_run(run_id) is not None:
            return
        run = Run.create_empty(run_id)
        run.series_id, run.fab_hash = run_id, self._code.hash_str
        node_id = self._state.get_node_id()
        self._state.store_run(run)
        self._state.set_run_series_context(run_id, Context(run_id, node_id, {}, RecordDict(), {}, run_id))


def main() -> int:
    """Serve until standard input ends. Returns the exit status."""
    order = Order(**json.loads(sys.stdin.readline()))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_follow, daemon=True).start()
    try:
        _serve(order, _say)
    except Refused as error:
        _say({"kind": "refused", "reason": str(error)})
    except Away as error:
        _say({"kind": "gone", "reason": str(error)})
    return 1


def _serve(order: Order, tell: Tell) -> NoReturn:
    factory = NodeStateFactory(ObjectStoreFactory())
    server = _runtime(factory, bytes.fromhex(order.secret))
    fleet = Fleet(order, read_private_key(Path(order.key)), tell)
    fleet.join()
    heart = HeartbeatSender(fleet.beat)
    try:
        heart.start()
        state = factory.state()
        state.set_node_id(fleet.node.node_id)
        office = Office(fleet, state)
        port = server.servers[0].sockets[0].getsockname()[1]
        tell({"kind": "connected", "node": fleet.node.node_id, "port": port})
        pause_seconds = _SHORTEST_POLL_SECONDS
        while True:
            if office.receive():
                office.wait()
                office.send()
                pause_seconds = _SHORTEST_POLL_SECONDS
            else:
                time.sleep(pause_seconds)
                pause_seconds = min(1.2 * pause_seconds, _LONGEST_POLL_SECONDS)
    except httpx.HTTPStatusError as error:
        raise Away(_refusal(error)) from error
    finally:
        fleet.leave()


def _runtime(factory: NodeStateFactory, secret: bytes) -> uvicorn.Server:
    """Start Flower's Runtime API on a free port of this machine alone."""
    app = create_app(state_factory=factory, superexec_auth_secret=secret)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, ws="none", access_log=False, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while thread.is_alive() and not server.started:
        time.sleep(0.02)
    if not server.started:
        raise Refused("the SuperNode could not listen on this machine's loopback address")
    return server


def _follow() -> None:
    """End this process when whoever started it is gone, or says so by closing our input."""
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)


def _stop(number: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.alarm(_GRACE_SECONDS)  # threads that wait for the server must not hold this process back
    raise SystemExit(0)


def _say(event: Mapping[str, Any]) -> None:
    print(json.dumps(event), flush=True)


def _is_final(error: Exception) -> bool:
    """Return whether waiting cannot mend it: a refusal, or a certificate that is not the server's."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code < httpx.codes.INTERNAL_SERVER_ERROR
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


def _code(error: httpx.HTTPStatusError) -> int | None:
    told = FlowerError.from_json(error.response.text)
    return None if told is None else told.code


def _refusal(error: httpx.HTTPStatusError) -> str:
    """Return what a server's refusal means, in one line."""
    code, status = _code(error), error.response.status_code
    if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return (
            "the server does not know this client's key, or a client with the same key is connected; put client.pub "
            "into the server's certificates as clients/NAME.pub, or stop the other client and wait a minute"
        )
    if status == httpx.codes.UNAUTHORIZED:
        return _unauthorized(error.response)
    if code is None:
        return (
            f"what answers there (HTTP status {status}) is no emberfed server, or one whose Flower is not of version "
            f"{flwr.__version__}, as here"
        )
    return f"the server refuses: {FlowerError.from_json(error.response.text)} (HTTP status {status}, Flower's {code})"


def _unauthorized(response: httpx.Response) -> str:
    try:
        ahead_seconds = (datetime.now(UTC) - parsedate_to_datetime(response.headers["date"])).total_seconds()
    except (KeyError, ValueError, TypeError):
        ahead_seconds = 0.0
    if abs(ahead_seconds) > 5:
        which = "ahead of" if ahead_seconds > 0 else "behind"
        return f"this machine's clock is {abs(ahead_seconds):.0f} seconds {which} the server's; set it (by NTP, say)"
    return "the server does not recognise this client any more: its key was taken away, or the server's state is new"


if __name__ == "__main__":
    raise SystemExit(main())
