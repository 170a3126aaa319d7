"""The server's side of a deployment, with real processes: a SuperLink, nodes with keys, and what may befall them.

Takes about a minute; each test less than 20 s.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import httpx
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.server.superlink.linkstate import LinkState, LinkStateFactory
from flwr.supercore.constant import FLEET_HTTP_PUBLIC_KEY_HEADER, FLWR_IN_MEMORY_DB_NAME, NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.protobuf.constants import PROTOBUF_MEDIA_TYPE
from flwr.superlink.federation import NoOpFederationManager
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from emberfed.engine import load_engine
from emberfed.errors import ConfigError, EngineError
from emberfed.events import Event, Notice, ignore
from emberfed.flower import certificates
from emberfed.flower import link as link_module
from emberfed.flower.arriving import Arriving
from emberfed.flower.conversation import Lost
from emberfed.flower.introduction import PATH, Introduction, introduce
from emberfed.flower.link import DeploymentConfig, SuperLinkLink, _client, _Told, open_link
from emberfed.flower.server_state import SECRET_HEADER, Running, ServerState, Serving, free
from emberfed.flower.superlink import FleetOnly, Nodes, SecretOnly

T = TypeVar("T")

LOOPBACK = "127.0.0.1"
PRIVATE_ROUTES = (
    "/v1/control/start-run",
    "/v1/control/list-nodes",
    "/v1/control/register-node",
    "/v1/runtime/acquire-task",
    "/v1/runtime/pull-messages",
    "/v1/runtime/get-nodes",
    "/docs",
    "/openapi.json",
    "/health",
    "/v1/fleet/../control/start-run",
    "/v1/fleet/%2e%2e/control/start-run",
    "//v1/control/start-run",
)


def free_port() -> int:
    """Return a port that nobody has."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def settings(port: int, **changes: Any) -> DeploymentConfig:
    """Return a deployment on the loopback."""
    return DeploymentConfig(
        **{"host": LOOPBACK, "port": port, "grace_seconds": 5.0, "patience_seconds": 60.0, **changes}
    )


def eventually(look: Callable[[], T | None], seconds: float = 40.0) -> T:
    """Return what `look` finds, once it finds something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        found = look()
        if found is not None:
            return found
        time.sleep(0.1)
    raise AssertionError(f"nothing within {seconds:g} s")


@contextmanager
def echo_node(server: str, folder: Path | None, name: str, state: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a client that gives back what it is sent."""
    state.mkdir(parents=True, exist_ok=True)
    with (state / "node.log").open("wb") as log:
        script = Path(__file__).with_name("echo_node.py")
        told = [server, "-" if folder is None else str(folder), name, str(state)]
        node = subprocess.Popen([sys.executable, str(script), *told], stdout=log, stderr=log)
        try:
            yield node
        finally:
            node.terminate()
            node.wait(30)


def asked(**what: Any) -> RecordDict:
    """Return a question for an echo."""
    return RecordDict({"asked": ConfigRecord(what)})


def answer_to(link: SuperLinkLink, message: str) -> RecordDict | Lost:
    """Wait for a reply."""
    while (found := link.pull(message)) is None:
        link.nodes()
        time.sleep(0.1)
    return found


def echo(link: SuperLinkLink, node: int, **what: Any) -> dict[str, Any]:
    """Ask, and return what comes back."""
    answer = answer_to(link, link.push(node, asked(**what), 60.0))
    assert isinstance(answer, RecordDict), answer
    return dict(answer.config_records["asked"])


def running(state: Path) -> Running:
    """Return the SuperLink of a server's state folder."""
    found = ServerState(state / "superlink").running()
    assert found is not None
    return found


@dataclass(frozen=True)
class Federation:
    """A server with certificates, one client of two connected."""

    port: int
    state: Path
    certificates: Path
    link: SuperLinkLink
    told: list[Event]
    node: int

    @property
    def alice(self) -> int:
        """Return the client's node."""
        return eventually(lambda: self.link.nodes().get("alice"))


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """Start it once; tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("federation")
    port, told = free_port(), list[Event]()
    certificates.make(folder / "certificates", [LOOPBACK], ["alice", "bob"], 30)
    server = folder / "certificates" / "server"
    with ExitStack() as stack:
        link = open_link(settings(port), folder / "state", server, told.append)
        stack.callback(link.close)
        address = f"{LOOPBACK}:{port}"
        alice = echo_node(address, folder / "certificates" / "alice", "alice", folder / "alice")
        node = stack.enter_context(alice)
        yield Federation(port, folder / "state", server, link, told, node.pid)
    assert free(ServerState(folder / "state" / "superlink").alive)


def test_a_client_is_known_by_the_name_of_its_key_and_answers(federation: Federation) -> None:
    node = federation.alice
    assert federation.link.nodes() == {"alice": node}
    assert [echo(federation.link, node, number=number)["number"] for number in range(3)] == [0, 1, 2]


def test_what_a_client_raises_comes_back_as_its_own_failure(federation: Federation) -> None:
    message = federation.link.push(federation.alice, asked(fail="out of tea"), 60.0)
    assert answer_to(federation.link, message) == Lost("ValueError: out of tea", away=False)


def test_a_payload_of_several_pieces_comes_back_as_it_was(federation: Federation) -> None:
    # Two equal pieces of 5 MB, which Flower stores once, and a rest.
    data = bytes(10_485_760) + os.urandom(1_000)
    content = asked(number=1)
    content["payload"] = ArrayRecord({"payload": Array("uint8", (len(data),), "bytes", data)})
    answer = answer_to(federation.link, federation.link.push(federation.alice, content, 60.0))
    assert isinstance(answer, RecordDict)
    assert answer.array_records["payload"]["payload"].data == data


def test_a_message_for_a_node_that_is_not_there_is_lost(federation: Federation) -> None:
    message = federation.link.push(12345, asked(number=1), 60.0)
    lost = federation.link.pull(message)
    assert isinstance(lost, Lost)
    assert lost.away


def test_a_superlink_killed_between_push_and_pull_costs_nothing(federation: Federation) -> None:
    before, node = running(federation.state), federation.alice
    message = federation.link.push(node, asked(number=7, wait=1.5), 60.0)
    os.kill(before.process, signal.SIGKILL)
    answer = answer_to(federation.link, message)
    assert isinstance(answer, RecordDict)
    assert answer.config_records["asked"]["number"] == 7
    assert running(federation.state).process != before.process
    assert federation.alice == node
    assert any(isinstance(event, Notice) and "started again" in event.message for event in federation.told)


def test_a_second_server_with_the_same_state_has_a_run_of_its_own(federation: Federation) -> None:
    other = open_link(settings(federation.port), federation.state, federation.certificates, ignore)
    try:
        node = eventually(lambda: other.nodes().get("alice"))
        mine = federation.link.push(node, asked(number=1), 60.0)
        theirs = other.push(node, asked(number=2), 60.0)
        answers = answer_to(federation.link, mine), answer_to(other, theirs)
        assert [answer.config_records["asked"]["number"] for answer in answers if isinstance(answer, RecordDict)] == [
            1,
            2,
        ]
    finally:
        other.close()
    assert echo(federation.link, federation.alice, number=3)["number"] == 3


@contextmanager
def database_of(federation: Federation) -> Iterator[sqlite3.Connection]:
    """Give the SuperLink's database."""
    database = sqlite3.connect(federation.state / "superlink" / "superlink.db", timeout=30.0)
    try:
        with database:
            yield database
    finally:
        database.close()


def is_kept(federation: Federation, object_id: str) -> bool:
    """Tell whether the SuperLink has an object."""
    with database_of(federation) as database:
        found = database.execute("SELECT count(*) FROM objects WHERE object_id = ?", [object_id]).fetchone()
    return bool(found[0])


def reply_to(federation: Federation, message: str) -> str | None:
    """Return the id of the reply to a message, if it is all there."""
    with database_of(federation) as database:
        found = database.execute(
            "SELECT message_id FROM message_res WHERE reply_to_message_id = ?", [message]
        ).fetchone()
    return found[0] if found else None


def test_a_superlink_that_cannot_keep_what_it_is_sent_is_given_up(federation: Federation) -> None:
    """Flower answers a full disk with `stored=False`; here its table of objects refuses in the same words."""
    patience = settings(federation.port, patience_seconds=1.2)
    impatient = open_link(patience, federation.state, federation.certificates, ignore)
    try:
        node = eventually(lambda: impatient.nodes().get("alice"))
        with database_of(federation) as database:
            database.execute(
                "CREATE TRIGGER full BEFORE UPDATE OF content ON objects "
                "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
            )
        began = time.monotonic()
        with pytest.raises(EngineError, match=r"could not keep a message for 1\.2 s \(engine\.patience_seconds\)"):
            impatient.push(node, asked(number=1), 60.0)
        assert time.monotonic() - began >= 1.2
    finally:
        with database_of(federation) as database:
            database.execute("DROP TRIGGER IF EXISTS full")
        impatient.close()
    log = (federation.state / "superlink" / "superlink.log").read_text()
    assert 1 <= log.count("database or disk is full") < 30  # tries with pauses between them
    assert echo(federation.link, federation.alice, number=2)["number"] == 2


def test_what_nobody_waits_for_is_not_kept(federation: Federation) -> None:
    link, node = federation.link, federation.alice
    busy = link.push(node, asked(number=1, wait=1.5), 60.0)
    eventually(lambda: True if delivered(federation, busy) else None)
    expired = link.push(node, asked(number=2), 0.3)
    again = link.push(node, asked(number=1), 60.0)  # the first question once more
    assert is_kept(federation, expired)
    assert isinstance(answer_to(link, busy), RecordDict)
    second = eventually(lambda: reply_to(federation, again))
    eventually(lambda: True if is_kept(federation, second) else None)
    link.push(node, asked(number=3), 60.0)
    assert not is_kept(federation, expired)
    assert not is_kept(federation, again)
    assert not is_kept(federation, second)


def test_a_reply_that_is_too_large_is_refused_and_not_kept(federation: Federation) -> None:
    small = settings(federation.port, largest_reply_bytes=1_000_000)
    link = open_link(small, federation.state, federation.certificates, ignore)
    try:
        node = eventually(lambda: link.nodes().get("alice"))
        assert echo(link, node, grow=900_000)["grow"] == 900_000
        message = link.push(node, asked(grow=1_100_000), 60.0)
        reply = eventually(lambda: reply_to(federation, message))
        told = "its reply has more than 1000000 bytes; engine.largest_reply_bytes is 1000000"
        assert answer_to(link, message) == Lost(told, away=False)
        assert not is_kept(federation, reply)
    finally:
        link.close()


def test_a_second_server_that_asks_for_something_else_is_refused(federation: Federation) -> None:
    with pytest.raises(EngineError, match=r"serves 127\.0\.0\.1:\d+ with the certificates .*use another state folder"):
        open_link(settings(federation.port), federation.state, None, ignore)


@pytest.mark.slow
def test_a_run_that_flower_gave_up_is_begun_anew(federation: Federation) -> None:
    state = ServerState(federation.state / "superlink")
    node = federation.alice
    message = federation.link.push(node, asked(number=1, wait=3.0), 60.0)
    with control(running(federation.state).port, state.secret()) as client:
        runs = [run for run in client.ListRuns(ListRunsRequest()).run_dict.values() if run.status.status != "finished"]
        assert len(runs) == 1
        client.StopRun(StopRunRequest(run_id=runs[0].run_id))
    lost = answer_to(federation.link, message)
    assert isinstance(lost, Lost)
    assert lost.away
    assert echo(federation.link, federation.alice, number=2)["number"] == 2


@contextmanager
def control(port: int, secret: str) -> Iterator[Any]:
    """Give a client of Flower's Control API."""
    client = _client(ControlHttpClient, port, [_Told(SECRET_HEADER, secret)])
    try:
        yield client
    finally:
        client.close()


@pytest.mark.slow
def test_a_client_whose_key_comes_later_is_let_in_and_one_whose_key_goes_is_not(federation: Federation) -> None:
    clients = federation.certificates.parent
    key = federation.certificates / "clients" / "carol.pub"
    certificates.make(clients, [], ["carol"], 30)
    address = f"{LOOPBACK}:{federation.port}"
    with echo_node(address, clients / "carol", "carol", clients.parent / "carol"):
        carol = eventually(lambda: federation.link.nodes().get("carol"))
        assert echo(federation.link, carol, number=1)["number"] == 1
        key.unlink()
        eventually(lambda: True if "carol" not in federation.link.nodes() else None)
        assert isinstance(federation.link.pull(federation.link.push(carol, asked(number=2), 60.0)), Lost)


@pytest.mark.slow
def test_a_node_that_was_killed_and_is_back_has_forgotten_its_message(federation: Federation) -> None:
    message = federation.link.push(federation.alice, asked(number=1, wait=2.0), 900.0)
    eventually(lambda: True if delivered(federation, message) else None)
    os.kill(child_of(federation.node), signal.SIGKILL)  # its SuperNode, which it starts again
    lost = answer_to(federation.link, message)
    assert isinstance(lost, Lost)
    assert lost.away
    assert echo(federation.link, federation.alice, number=2)["number"] == 2


def child_of(process: int) -> int:
    """Return the one process that another has started."""
    found = [file.read_text().split() for file in Path(f"/proc/{process}/task").glob("*/children")]
    (child,) = (int(number) for numbers in found for number in numbers)
    return child


def delivered(federation: Federation, message: str) -> bool:
    """Tell whether a node has fetched a message."""
    with sqlite3.connect(federation.state / "superlink" / "superlink.db") as database:
        found = database.execute("SELECT delivered_at FROM message_ins WHERE message_id = ?", [message]).fetchone()
    database.close()
    return bool(found[0])


def test_a_stranger_on_the_public_port_reaches_no_route_but_the_nodes(federation: Federation) -> None:
    trust = ssl.create_default_context(cafile=str(federation.certificates / "ca.pem"))
    address = f"{LOOPBACK}:{federation.port}"
    secret = ServerState(federation.state / "superlink").secret()
    with httpx.Client(verify=trust, trust_env=False) as stranger:
        for route in PRIVATE_ROUTES:
            for headers in ({}, {SECRET_HEADER: secret}):
                answer = stranger.post(f"https://{address}{route}", content=b"", headers=headers)
                assert (route, answer.status_code) == (route, 404)
        signed = stranger.post(
            f"https://{address}/v1/fleet/pull-messages", content=b"", headers={"content-type": PROTOBUF_MEDIA_TYPE}
        )
        assert signed.status_code == 401
        assert stranger.post(f"https://{address}{PATH}", json={}).status_code == 404
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://{address}/v1/fleet/pull-messages", content=b"", trust_env=False)
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.post(f"https://{address}/v1/fleet/pull-messages", content=b"", trust_env=False)


def test_the_loopback_wants_the_secret(federation: Federation) -> None:
    base = f"http://{LOOPBACK}:{running(federation.state).port}"
    secret = (federation.state / "superlink" / "secret").read_text()
    with httpx.Client(trust_env=False) as neighbour:
        assert neighbour.get(f"{base}/openapi.json").status_code == 404
        assert neighbour.get(f"{base}/openapi.json", headers={SECRET_HEADER: "guess"}).status_code == 404
        assert neighbour.get(f"{base}/openapi.json", headers={SECRET_HEADER: secret}).status_code == 200
    assert (federation.state / "superlink" / "secret").stat().st_mode & 0o077 == 0
    assert (federation.state / "superlink").stat().st_mode & 0o077 == 0


SERVER = """
import sys, time
from pathlib import Path
from emberfed.events import ignore
from emberfed.flower.link import DeploymentConfig, open_link
settings = DeploymentConfig(host="127.0.0.1", port=int(sys.argv[1]), grace_seconds=float(sys.argv[3]))
link = open_link(settings, Path(sys.argv[2]), None, ignore)
print("open", flush=True)
time.sleep(600)
"""


@contextmanager
def killed_server(port: int, state: Path, grace_seconds: float) -> Iterator[Running]:
    """Run a server, and kill it at the end."""
    told = [str(port), str(state), str(grace_seconds)]
    with subprocess.Popen([sys.executable, "-c", SERVER, *told], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == b"open\n"
            yield running(state)
        finally:
            server.kill()


@pytest.mark.slow
def test_a_server_that_comes_back_finds_its_superlink_at_work(tmp_path: Path) -> None:
    port = free_port()
    with killed_server(port, tmp_path, 30.0) as before:
        pass
    link = open_link(settings(port, grace_seconds=30.0), tmp_path, None, ignore)
    try:
        assert running(tmp_path) == before
    finally:
        link.close()
    assert free(ServerState(tmp_path / "superlink").alive)


@pytest.mark.slow
def test_a_superlink_does_not_outlive_a_killed_server_for_long(tmp_path: Path) -> None:
    alive = ServerState(tmp_path / "superlink").alive
    with killed_server(free_port(), tmp_path, 1.0):
        pass
    eventually(lambda: True if free(alive) else None)


@pytest.mark.slow
def test_without_certificates_clients_say_their_names(tmp_path: Path) -> None:
    port = free_port()
    address = f"{LOOPBACK}:{port}"
    link = open_link(settings(port), tmp_path / "state", None, ignore)
    try:
        with echo_node(address, None, "dora", tmp_path / "dora"):
            node = eventually(lambda: link.nodes().get("dora"))
            assert echo(link, node, number=1)["number"] == 1
            with pytest.raises(EngineError, match="another client is connected as 'dora'"):
                introduce(address, Introduction("dora", public_pem()))
            with pytest.raises(EngineError, match="an introduction has a 'name'"):
                introduce(address, Introduction("../dora", public_pem()))
            with pytest.raises(EngineError, match="public key cannot be used"):
                introduce(address, Introduction("eve", b"no key"))
            for route in PRIVATE_ROUTES:
                assert httpx.post(f"http://{address}{route}", content=b"", trust_env=False).status_code == 404
    finally:
        link.close()


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EngineError, match=rf"^port {port} of 127.0.0.1 is taken: .*engine.port"):
            open_link(settings(port), tmp_path, None, ignore)
    assert free(ServerState(tmp_path / "superlink").servers)


def test_an_address_of_another_machine_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="192.0.2.1 is no address of this machine"):
        open_link(settings(free_port(), host="192.0.2.1"), tmp_path, None, ignore)


@pytest.mark.slow
def test_a_superlink_that_cannot_be_started_just_now_is_started_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody uses the link: it is its signs of life that find the SuperLink gone."""
    monkeypatch.setattr(link_module, "_HEARTBEAT_SECONDS", 0.3)
    link = open_link(settings(free_port()), tmp_path, None, ignore)
    state = ServerState(tmp_path / "superlink")
    try:
        before = running(tmp_path)
        log = state.log.rename(tmp_path / "log")
        state.log.mkdir()  # a disk that cannot be written
        os.kill(before.process, signal.SIGKILL)
        eventually(lambda: True if not (state.root / "superlink.json").exists() else None)  # a start was tried
        time.sleep(0.5)
        state.log.rmdir()
        log.rename(state.log)
        assert eventually(state.running).process != before.process
    finally:
        link.close()


@pytest.mark.slow
def test_a_superlink_that_dies_at_its_start_says_why(tmp_path: Path) -> None:
    state = ServerState(tmp_path / "superlink")
    state.make()
    state.database.write_bytes(b"this is no database" * 100)
    with pytest.raises(EngineError, match="the SuperLink did not start: .*file is not a database.*superlink.log"):
        open_link(settings(free_port()), tmp_path, None, ignore)


def test_unusable_certificates_are_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="ca.pem"):
        open_link(settings(free_port()), tmp_path / "state", tmp_path / "nothing", ignore)
    assert not (tmp_path / "state").exists()


def test_the_flower_engine_is_not_for_emberfed_run() -> None:
    engine = load_engine("flower")
    with pytest.raises(ConfigError, match="start it with `emberfed server`"):
        engine(engine.Config(), None, None)  # type: ignore[arg-type]


def public_pem(curve: ec.EllipticCurve | None = None) -> bytes:
    """Return a new public key."""
    key = ec.generate_private_key(ec.SECP384R1() if curve is None else curve).public_key()
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def link_state() -> LinkState:
    """Return Flower's state, in memory."""
    manager, name = NoOpFederationManager(), FLWR_IN_MEMORY_DB_NAME
    return LinkStateFactory(name, manager, ObjectStoreFactory(name)).state()


def known(state: LinkState) -> dict[str, NodeInfo]:
    """Return the nodes that may connect."""
    statuses = [NodeStatus.REGISTERED, NodeStatus.ONLINE, NodeStatus.OFFLINE]
    return {node.name: node for node in state.get_node_info(statuses=statuses)}


def test_keys_are_registered_once_and_follow_the_folder(tmp_path: Path) -> None:
    certificates.make(tmp_path, [LOOPBACK], ["alice", "bob"], 30)
    state, server = link_state(), tmp_path / "server"
    Nodes(state, server).follow()
    first = known(state)
    assert sorted(first) == ["alice", "bob"]
    Nodes(state, server).follow()  # another process, the same database
    assert {name: node.node_id for name, node in known(state).items()} == {
        name: node.node_id for name, node in first.items()
    }
    nodes = Nodes(state, server)
    (server / "clients" / "bob.pub").rename(tmp_path / "bob.pub")
    nodes.follow()
    assert sorted(known(state)) == ["alice"]
    (tmp_path / "bob.pub").rename(server / "clients" / "bob.pub")
    with pytest.raises(EngineError, match=r"the key of client 'bob' was withdrawn before"):
        nodes.follow()


def test_a_key_is_withdrawn_whatever_else_is_wrong_with_the_folder_and_that_is_said_once(tmp_path: Path) -> None:
    certificates.make(tmp_path, [LOOPBACK], ["alice", "bob", "carol"], 30)
    state, server = link_state(), tmp_path / "server"
    nodes = Nodes(state, server)
    nodes.follow()
    keys = {name: node.public_key for name, node in known(state).items()}
    (server / "clients" / "bob.pub").unlink()
    (server / "clients" / "alice.pub").write_bytes(b"-----BEGIN PUBLIC")  # half of it has come
    (server / "clients" / "carol.pub").write_bytes(new := public_pem())
    (server / "server.pem").write_bytes(b"no certificate any more")
    with pytest.raises(EngineError, match=r"alice\.pub is no public key"):
        nodes.follow()
    assert {name: node.public_key for name, node in known(state).items()} == {"alice": keys["alice"], "carol": new}
    assert [nodes.knows(key) for key in (keys["alice"], keys["bob"], keys["carol"], new)] == [True, False, False, True]
    nodes.follow()  # nothing changed: nothing to say


def test_a_folder_of_keys_that_is_gone_withdraws_none(tmp_path: Path) -> None:
    certificates.make(tmp_path, [LOOPBACK], ["alice"], 30)
    state, clients = link_state(), tmp_path / "server" / "clients"
    nodes = Nodes(state, tmp_path / "server")
    nodes.follow()
    clients.rename(tmp_path / "elsewhere")
    with pytest.raises(EngineError, match="clients is gone; no key is withdrawn for that"):
        nodes.follow()
    assert sorted(known(state)) == ["alice"]
    clients.mkdir()
    nodes.follow()
    assert known(state) == {}


def test_a_new_key_under_an_old_name_replaces_it(tmp_path: Path) -> None:
    certificates.make(tmp_path, [LOOPBACK], ["alice"], 30)
    state, server = link_state(), tmp_path / "server"
    nodes = Nodes(state, server)
    nodes.follow()
    old = known(state)["alice"]
    (server / "clients" / "alice.pub").write_bytes(new := public_pem())
    nodes.follow()
    assert known(state)["alice"].public_key == new
    assert known(state)["alice"].node_id != old.node_id
    assert state.get_node_id_by_public_key(old.public_key) is None


def test_an_introduction_gives_way_only_to_its_own_key_or_once_it_is_gone() -> None:
    state, key, other = link_state(), public_pem(), public_pem()
    nodes = Nodes(state, None)
    assert nodes.introduce(Introduction("alice", key)) is None
    node = known(state)["alice"].node_id
    state.activate_node(node, 30.0)
    assert nodes.introduce(Introduction("alice", key)) is None
    assert known(state)["alice"].node_id == node
    refused = nodes.introduce(Introduction("alice", other))
    assert refused is not None
    assert "another client is connected as 'alice'" in refused
    state.deactivate_node(node)
    assert nodes.introduce(Introduction("alice", other)) is None
    assert known(state)["alice"].public_key == other
    refused = nodes.introduce(Introduction("bob", public_pem(ec.SECP256K1())))
    assert refused is not None
    assert "not a key on a NIST curve" in refused


async def says_path(request: Request) -> Response:
    """Answer with the path."""
    return PlainTextResponse(request.url.path)


def through(app: Any, method: str, path: str, **more: Any) -> int:
    """Return the status of a call."""

    async def call() -> int:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://server") as client:
            return (await client.request(method, path, **more)).status_code

    return asyncio.run(call())


def test_the_two_doors() -> None:
    behind = Starlette(routes=[Route("/{path:path}", says_path, methods=["GET", "POST"])])
    nodes, key = Nodes(link_state(), None), public_pem()
    assert nodes.introduce(Introduction("alice", key)) is None
    public = FleetOnly(behind, nodes, introductions=True)
    assert through(public, "POST", "/v1/fleet/pull-messages", content=b"some") == 200
    ours, theirs = ({FLEET_HTTP_PUBLIC_KEY_HEADER: b64encode(one).decode()} for one in (key, public_pem()))
    for path in ("/v1/fleet/push-object", "/v1/fleet/push-messages"):
        assert through(public, "POST", path, content=bytes(6 * 2**20), headers=ours) == 200
        assert through(public, "POST", path, content=bytes(17 * 2**20), headers=ours) == 413
        for headers in ({}, theirs, {FLEET_HTTP_PUBLIC_KEY_HEADER: "no base64"}):
            assert through(public, "POST", path, content=bytes(6 * 2**20), headers=headers) == 401
            assert through(public, "POST", path, content=b"some", headers=headers) == 200  # Flower says no, and why
    for path in ("/v1/fleet/pull-messages", "/v1/fleet/activate-node", PATH):
        assert through(public, "POST", path, content=bytes(2**17), headers=ours) == 413
    public = FleetOnly(behind, nodes, introductions=False)
    assert through(public, "POST", "/v1/fleet/pull-messages", headers={"content-length": "-1"}) == 413
    for path in ("/", "/v1/fleet", "/v1/control/start-run", "/v1/Fleet/pull-messages", PATH):
        assert through(public, "POST", path, content=b"some") == 404
    private = SecretOnly(behind, "swordfish")
    assert through(private, "GET", "/v1/control/start-run") == 404
    assert through(private, "GET", "/v1/control/start-run", headers={SECRET_HEADER: "swordfis"}) == 404
    assert through(private, "GET", "/v1/control/start-run", headers={SECRET_HEADER: "swordfish"}) == 200


def objects_of(content: RecordDict) -> tuple[str, dict[str, bytes]]:
    """Return a message's object id and all objects it is made of, as Flower makes them."""
    message = make_message(Metadata(1, "", 2, 1, "question", "", 1.8e9, 60.0, "query"), content)
    return message.object_id, {one: found.deflate() for one, found in get_all_nested_objects(message).items()}


def test_a_reply_is_put_together_as_its_pieces_come(tmp_path: Path) -> None:
    data = bytes(2 * 5_242_880) + os.urandom(77)
    content = asked(number=3)
    content["payload"] = ArrayRecord({"payload": Array("uint8", (len(data),), "bytes", data)})
    message, objects = objects_of(content)
    here: dict[str, bytes] = {}
    arriving = Arriving(message, here.get, tmp_path)
    for one in objects:  # the last is the message itself: nothing can be known before
        assert arriving.content() is None
        here[one] = objects[one]
    found = arriving.content()
    assert found is not None
    assert found.array_records["payload"]["payload"] == content.array_records["payload"]["payload"]
    assert found.config_records == content.config_records
    assert list(tmp_path.iterdir()) == []


def test_a_reply_whose_pieces_stop_coming_leaves_nothing_behind(tmp_path: Path) -> None:
    data = os.urandom(6_000_000)
    content = RecordDict({"payload": ArrayRecord({"payload": Array("uint8", (len(data),), "bytes", data)})})
    message, objects = objects_of(content)
    pieces = [one for one, body in objects.items() if body.startswith(b"ArrayChunk")]
    del objects[pieces[-1]]
    arriving = Arriving(message, objects.get, tmp_path)
    assert arriving.content() is None
    arriving.drop()
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_message_is_refused(tmp_path: Path) -> None:
    content = asked(number=3)
    objects = {one: found.deflate() for one, found in get_all_nested_objects(content).items()}
    with pytest.raises(ValueError, match="TypeError: not a message"):
        Arriving(content.object_id, objects.get, tmp_path).content()
    truncated = content.config_records["asked"].deflate()[:-1] + b"\xff"
    for junk in (b"", b"junk", truncated, b"Stranger  0\x00"):
        with pytest.raises(ValueError):
            Arriving("junk", {"junk": junk}.get, tmp_path).content()


def made_object(kind: str, children: Sequence[str], body: bytes) -> tuple[str, bytes]:
    """Return an object with its id, as Flower would store it, whatever is in it."""
    content = f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body
    return hashlib.sha256(content).hexdigest(), content


def arrives(root: str, objects: Mapping[str, bytes], folder: Path) -> str:
    """Return why a message of at most 100,000 bytes of arrays is refused, after at most 50 objects."""
    fetched = 0

    def fetch(object_id: str) -> bytes | None:
        nonlocal fetched
        fetched += 1
        assert fetched <= 50
        return objects[object_id]

    arriving = Arriving(root, fetch, folder, 100_000)
    with pytest.raises(ValueError) as refused:
        arriving.content()
    arriving.drop()
    assert list(folder.iterdir()) == []
    return str(refused.value)


def test_a_piece_that_an_array_names_over_and_over_is_not_written_over_and_over(tmp_path: Path) -> None:
    piece = made_object("ArrayChunk", [], bytes(30_000))
    nothing = made_object("ArrayChunk", [], b"")

    def told(order: Sequence[int]) -> bytes:
        return json.dumps({"dtype": "uint8", "shape": [1], "stype": "bytes", "arraychunk_ids": order}).encode()

    four = made_object("Array", [piece[0]], told([0, 0, 0, 0]))  # 120,000 bytes
    assert arrives(four[0], dict([piece, four]), tmp_path) == "more than 100000 bytes"
    many = made_object("Array", [nothing[0]], told([0] * 10_000))
    assert "pieces" in arrives(many[0], dict([nothing, many]), tmp_path)


def test_objects_that_share_children_are_not_walked_again_and_again(tmp_path: Path) -> None:
    """Each of 60 objects has the one before as a child, twice: 2^60 ways lead to the first."""
    objects = dict([below := made_object("RecordDict", [], b"")])
    for level in range(60):
        objects.update([below := made_object("RecordDict", [below[0]] * 2, str(level).encode())])
    refused = arrives(below[0], objects, tmp_path)
    assert "twice" in refused or "objects beside the pieces" in refused
    leaf = made_object("RecordDict", [], b"")
    twice = made_object("RecordDict", [leaf[0]] * 2, b"")
    assert "twice" in arrives(twice[0], dict([leaf, twice]), tmp_path)


def test_what_is_beside_arrays_stays_small(tmp_path: Path) -> None:
    records = [made_object("ConfigRecord", [], bytes([number]) * 6 * 2**20) for number in range(3)]
    root = made_object("RecordDict", [record[0] for record in records], b"")
    assert "beside its arrays" in arrives(root[0], dict([*records, root]), tmp_path)


def test_what_a_server_serves_is_written_as_an_address() -> None:
    assert Serving("::1", 9092, None, 1.0).address == "[::1]:9092"
    assert Serving("0.0.0.0", 9092, None, 1.0).address == "0.0.0.0:9092"
