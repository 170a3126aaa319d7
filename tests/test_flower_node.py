"""A client's two processes against a real SuperLink on TLS: answers, failures, deaths and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, final

import httpx
import psutil
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import message_from_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2, runtime_pb2
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID, NodeStatus, TaskType
from flwr.supercore.error import FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.servicer.fleet import fleet_handlers
from flwr.superlink.servicer.runtime import runtime_handlers
from flwr.supernode.nodestate import NodeState, NodeStateFactory

from emberfed.errors import EngineError, StorageError
from emberfed.events import ignore
from emberfed.flower import certificates
from emberfed.flower.conversation import Lost
from emberfed.flower.link import DeploymentConfig, SuperLinkLink, open_link
from emberfed.flower.node import Answered, NodeEvent, NodeSettings, Unrested, _answer_one, _Connection, _Door
from emberfed.flower.order import Order
from emberfed.flower.supernode import Fleet, Office, Refused, _is_final, _runtime

ECHO = Path(__file__).with_name("flower_echo.py")
SECRET = bytes(32)


def until(happened: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@final
@dataclass(frozen=True)
class Federation:
    """A server's link, and where its clients' files are."""

    link: SuperLinkLink
    port: int
    certificates: Path

    def ask(self, client: str, payload: bytes = b"", **do: str | float) -> str:
        until(lambda: client in self.link.nodes())
        array = Array(dtype="uint8", shape=(len(payload),), stype="bytes", data=payload)
        content = RecordDict({"do": ConfigRecord(dict(do)), "payload": ArrayRecord({"payload": array})})
        return self.link.push(self.link.nodes()[client], content, 60.0)

    def answer(self, message: str) -> RecordDict | Lost:
        replies: list[RecordDict | Lost] = []

        def look() -> bool:
            replies.extend(reply for reply in [self.link.pull(message)] if reply is not None)
            return bool(replies)

        until(look)
        return replies[0]


@final
@dataclass(frozen=True)
class Client:
    """A client's process."""

    process: psutil.Popen
    log: Path

    def told(self) -> str:
        return self.log.read_text()

    def supernode(self) -> psutil.Process:
        found: list[psutil.Process] = []

        def look() -> bool:
            with suppress(psutil.NoSuchProcess):
                found[:] = [child for child in self.process.children() if child.status() != psutil.STATUS_ZOMBIE]
            return len(found) == 1

        until(look)
        return found[0]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    made, port = folder / "certificates", free_port()
    certificates.make(made, ["localhost"], ["anna", "ben"], 30)
    settings = DeploymentConfig(host="127.0.0.1", port=port, grace_seconds=0.0)
    link = open_link(settings, folder / "server", made / "server", ignore)
    try:
        yield Federation(link, port, made)
    finally:
        link.close()


@contextmanager
def client(
    federation: Federation,
    folder: Path,
    files: Path | str,
    name: str = "anna",
    server: str = "",
    patience: float = 20.0,
) -> Iterator[Client]:
    log = folder / "client.log"
    address = server or f"localhost:{federation.port}"
    with log.open("a") as out:
        command = [sys.executable, str(ECHO), address, str(files), str(folder / "state"), name, str(patience)]
        process = psutil.Popen(command, stdout=out, stderr=out, env=quiet(os.environ))
    try:
        yield Client(process, log)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def quiet(environment: Mapping[str, str]) -> dict[str, str]:
    """Tests' clients see a proxy, which must not be asked for anything on this machine."""
    return {
        **environment,
        "OMP_NUM_THREADS": "1",
        "http_proxy": "http://127.0.0.1:1",
        "HTTPS_PROXY": "http://127.0.0.1:1",
    }


@pytest.fixture
def anna(federation: Federation, tmp_path: Path) -> Iterator[Client]:
    with client(federation, tmp_path, federation.certificates / "anna") as process:
        until(lambda: "Connected" in process.told())
        yield process


def test_questions_are_answered_and_failures_told(federation: Federation, anna: Client) -> None:
    """One that fails does not end the client; a payload of several of Flower's 5 MB pieces comes back whole."""
    payload = os.urandom(12_000_000)
    answered = federation.answer(federation.ask("anna", payload, what="echo"))
    assert isinstance(answered, RecordDict)
    assert answered.array_records["payload"]["payload"].data == payload
    failed = federation.answer(federation.ask("anna", what="fail"))
    assert isinstance(failed, Lost)
    assert "ValueError: as asked" in failed.reason
    assert isinstance(federation.answer(federation.ask("anna", what="echo")), RecordDict)
    until(lambda: anna.told().count("rested") == 3)
    assert "problem='ValueError: as asked'" in anna.told()


def test_only_loopback_is_listened_on(federation: Federation, anna: Client) -> None:
    listening = [one.laddr.ip for one in anna.supernode().net_connections() if one.status == psutil.CONN_LISTEN]
    assert listening == ["127.0.0.1"]
    assert not [one for one in anna.process.net_connections() if one.status == psutil.CONN_LISTEN]


def test_sigterm_ends_both_processes_and_the_server_sees_it(federation: Federation, anna: Client) -> None:
    supernode = anna.supernode()
    anna.process.send_signal(signal.SIGTERM)
    assert anna.process.wait(10) == 0
    assert anna.told().endswith("stopped\n")
    assert not supernode.is_running()
    until(lambda: "anna" not in federation.link.nodes(), 5.0)


def test_a_killed_client_leaves_no_orphan_and_comes_back_at_once(
    federation: Federation, anna: Client, tmp_path: Path
) -> None:
    supernode = anna.supernode()
    anna.process.kill()
    supernode.wait(10)
    until(lambda: "anna" not in federation.link.nodes(), 5.0)
    with client(federation, tmp_path, federation.certificates / "anna"):
        assert isinstance(federation.answer(federation.ask("anna", what="echo")), RecordDict)


@pytest.mark.slow
def test_a_supernode_killed_in_the_middle_of_an_answer_is_replaced(federation: Federation, anna: Client) -> None:
    """What it was asked is lost, and the server is told so, long before the old heartbeat expires."""
    lost = federation.ask("anna", what="wait", seconds=3.0)
    until(lambda: "asked wait" in anna.told())
    anna.supernode().kill()
    told = federation.answer(lost)
    assert isinstance(told, Lost)
    assert told.away
    until(lambda: anna.told().count("Connected") == 2)
    assert isinstance(federation.answer(federation.ask("anna", what="echo")), RecordDict)
    assert "the SuperNode ended meanwhile" in anna.told()


def test_one_state_folder_is_one_client_s(federation: Federation, anna: Client, tmp_path: Path) -> None:
    with client(federation, tmp_path, federation.certificates / "ben") as second:
        assert second.process.wait(20) == EngineError.exit_code
        assert "error: EngineError: another client runs with the folder" in second.told()


def test_an_unknown_key_is_refused(federation: Federation, tmp_path: Path) -> None:
    stranger = Path(shutil.copytree(federation.certificates / "ben", tmp_path / "stranger"))
    (stranger / "client.pub").unlink()
    (stranger / "client.key").unlink()
    certificates.own_key(stranger / "client.key")
    with client(federation, tmp_path, stranger) as process:
        assert process.process.wait(20) == EngineError.exit_code
        assert "the server does not know this client's key" in process.told()


@pytest.mark.parametrize("case", ["wrong CA", "wrong host", "no certificates", "nobody there"])
def test_a_server_that_cannot_be_trusted_or_reached_is_named(federation: Federation, tmp_path: Path, case: str) -> None:
    certificates.make(tmp_path / "other", ["localhost"], ["anna"], 30)
    own = federation.certificates / "anna"
    cases: dict[str, tuple[Path | str, str, str]] = {
        "wrong CA": (tmp_path / "other" / "anna", "", "is not signed by the CA in"),
        "wrong host": (own, f"127.0.0.1:{federation.port}", "is not for '127.0.0.1'"),
        "no certificates": ("-", "", "speaks TLS"),
        "nobody there": (own, f"localhost:{free_port()}", "nothing listens at"),
    }
    files, server, told = cases[case]
    with client(federation, tmp_path, files, server=server, patience=0.5) as process:
        assert process.process.wait(20) == EngineError.exit_code
        lines = [line for line in process.told().splitlines() if line.startswith("error: EngineError: ")]
        assert len(lines) == 1
        assert told in lines[0]


@pytest.mark.slow
def test_without_certificates_a_client_says_its_name(tmp_path: Path) -> None:
    port = free_port()
    settings = DeploymentConfig(host="127.0.0.1", port=port, grace_seconds=0.0)
    link = open_link(settings, tmp_path / "server", None, ignore)
    try:
        federation = Federation(link, port, tmp_path)
        (tmp_path / "client").mkdir()
        with client(federation, tmp_path / "client", "-", "cleo") as process:
            assert isinstance(federation.answer(federation.ask("cleo", what="echo")), RecordDict)
            process.process.kill()
        (tmp_path / "secured").mkdir()
        certificates.make(tmp_path / "made", ["localhost"], ["anna"], 30)
        with client(federation, tmp_path / "secured", tmp_path / "made" / "anna") as process:
            assert process.process.wait(20) == EngineError.exit_code
            assert "does not speak TLS" in process.told()
    finally:
        link.close()


def test_the_pipe_is_all_that_keeps_a_supernode(tmp_path: Path) -> None:
    """Standard input that ends at once ends the process."""
    command = [sys.executable, "-m", "emberfed.flower.supernode"]
    ended = subprocess.run(command, input="", capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode != 0
    assert ended.stdout == ""


def link_state() -> LinkState:
    """Return a SuperLink's state in a database in memory."""
    objects = ObjectStoreFactory(FLWR_IN_MEMORY_DB_NAME)
    return LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), objects).state()


@final
@dataclass
class Server:
    """Flower's Fleet API, served from this process without signatures.

    Attributes:
        state: What it knows.
        lost: Calls whose next answer gets lost on its way: one element for each.
        moved: Where it sends every caller instead of answering.
        full: It cannot keep another object.
        called: The calls that came.
    """

    state: LinkState = field(default_factory=link_state)
    lost: list[str] = field(default_factory=list)
    moved: str | None = None
    full: bool = False
    called: list[str] = field(default_factory=list)

    def register(self, key: ec.EllipticCurvePrivateKey) -> int:
        told = public_key_to_bytes(key.public_key())
        return self.state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, told, 30.0, name="anna")

    def run(self) -> int:
        run = self.state.create_run(None, None, None, {}, NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        (task,) = self.state.get_tasks()
        assert self.state.claim_task(task.task_id)
        assert self.state.activate_task(task.task_id)
        return run

    def ask(self, run: int, node: int, payload: bytes) -> str:
        """Send a question to a node; return its id."""
        content = RecordDict({"payload": ArrayRecord({"payload": Array("uint8", (len(payload),), "bytes", payload)})})
        metadata = Metadata(run, "", SUPERLINK_NODE_ID, node, "", "", time.time(), 600.0, "query")
        message = make_message(metadata, content)
        with no_object_id_recompute():
            asked: str = message.object_id
            metadata.__dict__["_message_id"] = asked
            session = self.state.start_session(run)
            tree = get_object_tree(message)
            stored, lacking = self.state.store_message_and_object_tree(
                remove_content_from_message(message), tree, session
            )
            assert stored
            parts = get_all_nested_objects(message)
            assert all(self.state.store_object(run, session, one, parts[one].deflate()) for one in lacking)
        return asked

    def replies(self, asked: str) -> list[Any]:
        """Look for the reply to a question, as the server's own process does."""
        (task,) = self.state.get_tasks()
        request = runtime_pb2.PullAppMessagesRequest(message_ids=[asked])
        found = runtime_handlers.pull_messages(request, self.state, task).messages_list
        return [message_from_proto(one) for one in found]

    def answer(self, path: str, body: bytes) -> Any:
        state, store = self.state, self.state.object_store
        match path.rpartition("/")[2]:
            case "activate-node":
                return fleet_handlers.activate_node(fleet_pb2.ActivateNodeRequest.FromString(body), state)
            case "deactivate-node":
                return fleet_handlers.deactivate_node(fleet_pb2.DeactivateNodeRequest.FromString(body), state)
            case "send-node-heartbeat":
                beat = heartbeat_pb2.SendNodeHeartbeatRequest.FromString(body)
                return fleet_handlers.send_node_heartbeat(beat, state)
            case "pull-messages":
                return fleet_handlers.pull_messages(fleet_pb2.PullMessagesRequest.FromString(body), state, store)
            case "push-messages":
                return fleet_handlers.push_messages(fleet_pb2.PushMessagesRequest.FromString(body), state)
            case "push-object" if self.full:
                return message_pb2.PushObjectResponse(stored=False)
            case "push-object":
                return fleet_handlers.push_object(message_pb2.PushObjectRequest.FromString(body), state)
            case "pull-object":
                return fleet_handlers.pull_object(message_pb2.PullObjectRequest.FromString(body), state)
            case "confirm-message-received":
                confirmed = message_pb2.ConfirmMessageReceivedRequest.FromString(body)
                return fleet_handlers.confirm_message_received(confirmed, state, store)
        raise AssertionError(path)


@contextmanager
def serving(server: Server) -> Iterator[str]:
    """Serve; give the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            call = self.path.rpartition("/")[2]
            server.called.append(call)
            if server.moved is not None:
                self.send_response(307)
                self.send_header("location", server.moved + self.path)
                return self.end_headers()
            try:
                status, answer = 200, server.answer(self.path, body).SerializeToString()
            except FlowerError as error:
                status, answer = 412, json.dumps(error.to_json("refused")).encode()
            if call in server.lost:
                server.lost.remove(call)
                return None
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)
            return None

        def log_message(self, format: str, *args: object) -> None: ...

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@final
@dataclass(frozen=True)
class Joined:
    """A node of a server's, in this process."""

    server: Server
    fleet: Fleet
    node: int

    def activated(self) -> str:
        (found,) = self.server.state.get_node_info(node_ids=[self.node])
        assert found.status == NodeStatus.ONLINE
        return str(found.last_activated_at)


@contextmanager
def fleet_of(address: str, folder: Path, patience_seconds: float = 20.0) -> Iterator[Fleet]:
    key = folder / "client.key"
    order = Order(address, None, str(certificates.own_key(key)), None, str(folder / "node.json"), "", patience_seconds)
    fleet = Fleet(order, certificates.read_private_key(key), lambda event: None)
    try:
        yield fleet
    finally:
        fleet._client.close()


@contextmanager
def joining(folder: Path, patience_seconds: float = 20.0) -> Iterator[Joined]:
    server = Server()
    with serving(server) as address, fleet_of(address, folder, patience_seconds) as fleet:
        node = server.register(certificates.read_private_key(folder / "client.key"))
        fleet.join()
        yield Joined(server, fleet, node)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Joined]:
    with joining(tmp_path) as node:
        yield node


@final
@dataclass(frozen=True)
class Runtime:
    """A SuperNode's Runtime API, in this process."""

    state: NodeState
    door: _Door


@contextmanager
def runtime_of(joined: Joined) -> Iterator[Runtime]:
    factory = NodeStateFactory(ObjectStoreFactory())
    state = factory.state()
    state.set_node_id(joined.node)
    server = _runtime(factory, SECRET)
    try:
        yield Runtime(state, _Door(server.servers[0].sockets[0].getsockname()[1], SECRET))
    finally:
        server.should_exit = True
        until(lambda: not server.servers[0].is_serving())


@pytest.fixture
def runtime(joined: Joined) -> Iterator[Runtime]:
    with runtime_of(joined) as api:
        yield api


@final
@dataclass(frozen=True)
class Echo:
    """A desk that gives questions back, and fails at rest if it is given a reason."""

    fails: str | None = None

    def answer(self, content: RecordDict) -> RecordDict:
        return content

    def rest(self) -> None:
        if self.fails is not None:
            raise StorageError(self.fails)


def test_a_question_lost_on_its_way_shows_as_a_new_connection(joined: Joined) -> None:
    """The call that claims it is handled, its answer lost; the repeated one finds nothing, and Flower tells nobody.

    A call that got no answer because there was no connection cannot have claimed anything.
    """
    run = joined.server.run()
    before = joined.activated()
    assert joined.fleet.pull() is None
    assert joined.activated() == before
    joined.server.ask(run, joined.node, b"lost")
    joined.server.lost.append("pull-messages")
    assert joined.fleet.pull() is None
    assert joined.activated() != before
    again, before = joined.server.ask(run, joined.node, b"again"), joined.activated()
    pulled = joined.fleet.pull()
    assert pulled is not None
    assert pulled[0].metadata.message_id == again
    joined.fleet.settled()
    assert joined.fleet.pull() is None
    assert joined.activated() == before


def test_heartbeats_do_not_come_between_leaving_and_joining(joined: Joined) -> None:
    """One that arrives there makes the node count as connected, and Flower refuses to activate it again."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            joined.fleet.beat()

    hearts = [threading.Thread(target=beat) for _ in range(4)]
    for heart in hearts:
        heart.start()
    try:
        for _ in range(20):
            joined.fleet.join()
    finally:
        stop.set()
        for heart in hearts:
            heart.join()


def test_a_call_is_never_sent_on_to_another_address(tmp_path: Path) -> None:
    inside, server = Server(), Server()
    with serving(inside) as private, serving(server) as public, fleet_of(public, tmp_path) as fleet:
        server.moved = f"http://{private}"
        with pytest.raises(Refused, match="HTTP status 307"):
            fleet.join()
    assert server.called
    assert inside.called == []


def test_a_question_that_could_not_be_kept_leaves_nothing_behind(
    joined: Joined, runtime: Runtime, tmp_path: Path
) -> None:
    """The client's folder is gone, so the question's payload cannot be written: it is answered with a failure."""
    office, told = Office(joined.fleet, runtime.state), list[NodeEvent]()
    joined.server.ask(joined.server.run(), joined.node, os.urandom(1000))
    assert office.receive()
    assert len(runtime.state.object_store) > 0
    assert _answer_one(runtime.door, Echo(), told.append, tmp_path / "gone")
    assert "StorageError" in str(told[0])
    office.send()
    assert len(runtime.state.object_store) == 0


def test_a_full_disk_at_rest_is_told_and_ends_nothing(joined: Joined, runtime: Runtime, tmp_path: Path) -> None:
    office = Office(joined.fleet, runtime.state)
    joined.server.ask(joined.server.run(), joined.node, b"question")
    assert office.receive()
    told: list[NodeEvent] = []
    assert _answer_one(runtime.door, Echo("no space left on device"), told.append, tmp_path)
    assert [type(event) for event in told] == [Answered, Unrested]
    assert told[1] == Unrested("no space left on device")
    assert not _answer_one(runtime.door, Echo("no space left on device"), told.append, tmp_path)


def test_looking_for_tasks_loads_no_certificates(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    """That takes 38 ms of a processor, ten times a second."""
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    assert runtime.door.take() is None
    door = _Door(1, SECRET)
    assert door._taker._client._transport._pool._ssl_context.cert_store_stats()["x509_ca"] == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("looked", [False, True], ids=["before it is looked for", "after"])
def test_a_reply_waits_for_room_on_the_server(joined: Joined, runtime: Runtime, tmp_path: Path, looked: bool) -> None:
    """Flower takes a message no second time once the server's process has looked for it; its objects it does.

    The answer to the first object that is kept gets lost besides, and Flower refuses what it has.
    """
    office, server = Office(joined.fleet, runtime.state), joined.server
    asked = server.ask(server.run(), joined.node, os.urandom(1000))
    assert office.receive()
    assert _answer_one(runtime.door, Echo(), ignored, tmp_path)
    server.full = True
    sending = threading.Thread(target=office.send)
    sending.start()
    until(lambda: "push-object" in server.called)
    known = server.replies(asked) if looked else []
    server.lost.append("push-object")
    server.full = False
    sending.join(10)
    (reply,) = known or server.replies(asked)
    tree = server.state.object_store.get_object_tree(reply.metadata.message_id)
    assert all(server.state.object_store.get(part.object_id) for part in iterate_object_tree(tree))


@pytest.mark.parametrize("looked", [False, True], ids=["before it was looked for", "after"])
def test_a_reply_that_finds_no_room_is_taken_back(tmp_path: Path, looked: bool) -> None:
    """The server, which knows that it would come, sees at once that it will not; not when its upload expires.

    It sees that its objects are gone, or, if it had not looked for the reply yet, that there is none to the question.
    """
    with joining(tmp_path, patience_seconds=0.5) as joined, runtime_of(joined) as runtime:
        office, server = Office(joined.fleet, runtime.state), joined.server
        run = server.run()
        asked = server.ask(run, joined.node, os.urandom(1000))
        assert office.receive()
        assert _answer_one(runtime.door, Echo(), ignored, tmp_path)
        server.full = True
        sending = threading.Thread(target=office.send)
        sending.start()
        until(lambda: "push-object" in server.called)
        known = server.replies(asked) if looked else []
        sending.join(20)
        if looked:
            (reply,) = known
            assert server.state.get_object(run, reply.metadata.message_id) is None
        else:
            assert server.replies(asked) == []
            (told,) = server.replies(asked)
            assert told.error.code == ErrorCode.MESSAGE_UNAVAILABLE


def ignored(event: NodeEvent) -> None:
    """Take no notice."""


@contextmanager
def silent() -> Iterator[str]:
    """Give an address where connections are taken, and nothing is ever said."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def greeting(certificate: Path) -> Iterator[str]:
    """Give an address where one TLS handshake is made."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "server.pem", certificate / "server.key")

    def greet() -> None:
        with suppress(OSError), context.wrap_socket(server.accept()[0], server_side=True) as connection:
            connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"
        thread.join()


def test_a_handshake_that_takes_long_is_waited_for_and_a_wrong_certificate_is_not(tmp_path: Path) -> None:
    certificates.make(tmp_path, ["127.0.0.1"], [], 30)
    with httpx.Client(timeout=0.3, trust_env=False) as caller:
        with silent() as address, pytest.raises(httpx.ConnectTimeout, match="handshake") as late:
            caller.get(f"https://{address}")
        with greeting(tmp_path / "server") as address, pytest.raises(httpx.ConnectError) as strange:
            caller.get(f"https://{address}")
    assert not _is_final(late.value)
    assert _is_final(strange.value)


def test_a_supernode_that_gave_up_is_started_again_until_patience_is_used_up(tmp_path: Path) -> None:
    """It ends when the server was away; whether that is the end of the client is for the client to say."""
    address, gone = f"127.0.0.1:{free_port()}", {"kind": "gone", "reason": "no answer"}
    patient = _Connection(NodeSettings(address, None, "anna", tmp_path, 60.0))
    assert not patient._hear(gone, SECRET)
    assert "nothing listens at" in str(next(patient.news()))
    hasty = _Connection(NodeSettings(address, None, "anna", tmp_path, 0.0))
    with pytest.raises(EngineError, match="nothing listens at"):
        hasty._hear(gone, SECRET)


def test_time_that_a_supernode_waited_counts(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    connection = _Connection(NodeSettings(address, None, "anna", tmp_path, 0.2))
    connection._met()
    connection._hear({"kind": "away", "reason": "no answer"}, SECRET)
    time.sleep(0.3)
    with pytest.raises(EngineError, match=r"nothing listens at .* \(waited"):
        connection._hear({"kind": "gone", "reason": "no answer"}, SECRET)
