"""A client's two processes against a real SuperLink on TLS: answers, failures, deaths and refusals."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

import psutil
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from emberfed.errors import EngineError
from emberfed.events import ignore
from emberfed.flower import certificates
from emberfed.flower.conversation import Lost
from emberfed.flower.link import DeploymentConfig, SuperLinkLink, open_link

ECHO = Path(__file__).with_name("flower_echo.py")


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
