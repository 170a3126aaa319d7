"""The pool engine with real processes: who is asked when, what dies and what does not, and the local engine's bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from compact_worlds import played
from federations import Vision, bits, config
from pool_clerks import Clerk, Desk, job, wait_for
from reused_pool import ReusedPool

import emberfed
from emberfed import assembly
from emberfed.engine import Engine, IdleTime
from emberfed.engines.pool import PoolConfig, PoolEngine
from emberfed.errors import ConfigError, EmberfedError, EngineError, ModelError, StorageError
from emberfed.method import load_method, method_names
from emberfed.methods.linear_probe import HeadConfig
from emberfed.records import ClientFailed, Job, Reply
from emberfed.sections import validate


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("desk")


def pool(folder: Path, processes: int = 2, trouble: str = "") -> PoolEngine:
    return PoolEngine(PoolConfig(processes=processes), Clerk(folder, "server"), Desk(folder, trouble))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine(folder: Path) -> Iterator[PoolEngine]:
    """Two processes that most tests share: each leaves them without a question."""
    engine = pool(folder)
    yield engine
    engine.close()


def pids(replies: list[Reply | ClientFailed]) -> set[int]:
    return {int(reply.measured["pid"]) for reply in replies if isinstance(reply, Reply)}


def clients(replies: list[Reply | ClientFailed]) -> list[str]:
    return [reply.client for reply in replies]


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(numbers: set[int]) -> None:
    for _ in range(30_000):
        if not any(alive(pid) for pid in numbers):
            return
        time.sleep(0.01)
    raise AssertionError(f"some of {numbers} live on")


# ------------------------------------------------------------------------------------------ who is asked when


def test_clients_are_asked_at_the_same_time_in_other_processes(engine: PoolEngine, folder: Path) -> None:
    """Each waits for a file that the other makes when it begins."""
    replies = list(engine.map([job("ann", "wait bob waits"), job("bob", "wait ann waits")]))
    assert sorted(clients(replies)) == ["ann", "bob"]
    assert len(pids(replies)) == 2
    assert os.getpid() not in pids(replies)


def test_replies_come_as_they_end_and_every_question_has_one(engine: PoolEngine, folder: Path) -> None:
    """The first client waits for what is done only when all others have answered."""
    questions = [job("slow", "wait all others"), *(job(f"quick{number}") for number in range(9)), job("ill", "fail")]
    replies = []
    for reply in engine.map(questions):
        replies.append(reply)
        if len(replies) == len(questions) - 1:
            (folder / "all others").touch()
    assert clients(replies)[-1] == "slow"
    assert sorted(clients(replies)) == sorted(question.client for question in questions)
    assert [reply.reason for reply in replies if isinstance(reply, ClientFailed)] == ["not today"]


def test_downloads_are_formed_when_they_are_needed(engine: PoolEngine) -> None:
    """Two for each of two processes are out, and one is in hand; every reply lets one more be formed."""
    formed = 0

    def questions() -> Iterator[Job]:
        nonlocal formed
        for number in range(30):
            formed += 1
            yield job(f"client{number}")

    for arrived, _ in enumerate(engine.map(questions()), start=1):
        assert arrived <= formed <= arrived + 4 + 1
    assert formed == 30


def test_a_client_has_one_question_at_a_time(engine: PoolEngine) -> None:
    """A client that is asked while it is at work would find the file of the other question."""
    replies = list(engine.map([job(f"client{number % 2}", "alone") for number in range(12)]))
    assert [type(reply) for reply in replies] == [Reply] * 12


def test_a_round_that_was_given_up_leaves_no_replies_behind(engine: PoolEngine) -> None:
    """The server stops listening after the first reply; of what was out, nothing reaches the next round."""
    first = engine.map([job(f"client{number}", round=1) for number in range(8)])
    next(first)
    first.close()  # type: ignore[attr-defined]
    replies = list(engine.map([job(f"client{number}", round=2) for number in range(4)]))
    assert sorted((reply.round, reply.client) for reply in replies) == [(2, f"client{number}") for number in range(4)]


def test_nothing_is_started_for_no_questions(tmp_path: Path) -> None:
    engine = pool(tmp_path)
    assert list(engine.map([])) == []
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_processes_compute_with_the_servers_threads(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    engine = pool(tmp_path, processes=1)
    try:
        (reply,) = engine.map([job("ann")])
    finally:
        torch.set_num_threads(before)
        engine.close()
    assert isinstance(reply, Reply)
    assert reply.measured["threads"] == 3


# ------------------------------------------------------------------------------------------ idle work


def test_idle_work_runs_beside_the_server_and_the_next_question_waits_for_it(engine: PoolEngine, folder: Path) -> None:
    list(engine.map([]))
    engine.take_idle()
    replies = list(engine.map([job("wait the server"), job("idler"), job("ill", "fail")]))
    assert len(replies) == 3, "all are here while the first is yet to work"
    wait_for(folder / "idler idled")
    assert not (folder / "wait the server idled").exists()
    assert engine.take_idle() == IdleTime()
    (folder / "the server").touch()
    list(engine.map([]))
    assert (folder / "wait the server idled").exists()
    idle = engine.take_idle()
    assert idle.work_seconds == 3 * 0.25
    assert 0 <= idle.waited_seconds <= idle.work_seconds
    assert engine.take_idle() == IdleTime()


def test_a_process_that_dies_in_idle_time_is_nobodys_failure(engine: PoolEngine) -> None:
    list(engine.map([]))
    engine.take_idle()
    list(engine.map([job("die"), job("idler")]))
    replies = list(engine.map([job("ann"), job("bob")]))
    assert [type(reply) for reply in replies] == [Reply, Reply]
    assert engine.take_idle().work_seconds == 0.25


@pytest.mark.parametrize("way", ["ask", "close"])
def test_a_full_disk_in_idle_work_is_raised_where_the_engine_is_used_next(way: str, tmp_path: Path) -> None:
    engine = pool(tmp_path, processes=1)
    list(engine.map([job("full"), job("idler")]))
    wait_for(tmp_path / "idler idled")
    with pytest.raises(StorageError, match="^could not write: the disk is full; make room$"):
        list(engine.map([])) if way == "ask" else engine.close()
    engine.close()


# ------------------------------------------------------------------------------------------ what dies


@pytest.mark.parametrize(("told", "how"), [("die", "killed by SIGKILL"), ("exit", "exit status 3")])
def test_a_process_that_dies_fails_its_client_and_is_replaced(
    told: str, how: str, engine: PoolEngine, folder: Path
) -> None:
    before = pids(list(engine.map([job("ann", "wait bob waits"), job("bob", "wait ann waits")])))
    replies = list(engine.map([job("ill", told), *(job(f"client{number}") for number in range(6))]))
    failed = [reply for reply in replies if isinstance(reply, ClientFailed)]
    assert [reply.client for reply in failed] == ["ill"]
    assert how in failed[0].reason
    assert "\n" not in failed[0].reason
    assert len(replies) == 7
    for name in ("cleo", "dora"):
        (folder / f"{name} waits").unlink(missing_ok=True)
    after = pids(list(engine.map([job("cleo", "wait dora waits"), job("dora", "wait cleo waits")])))
    assert len(after) == 2
    assert len(after & before) == 1, "one was replaced, the other lives"


def test_a_bug_in_the_clients_is_shown_and_fails_one_client(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    engine = pool(tmp_path, processes=1)
    replies = list(engine.map([job("ill", "bug"), job("ann")]))
    engine.close()
    assert [reply.client for reply in replies if isinstance(reply, ClientFailed)] == ["ill"]
    assert "KeyError: 'a mistake in the clients'" in capfd.readouterr().err


def test_a_full_disk_stops_the_run(engine: PoolEngine) -> None:
    with pytest.raises(StorageError, match="^could not write: the disk is full; make room$"):
        list(engine.map([job("ann"), job("ill", "full"), job("bob")]))
    assert clients(list(engine.map([job("ann")]))) == ["ann"]


@pytest.mark.parametrize(
    ("trouble", "kind", "words"),
    [
        ("model", ModelError, "^model folder /nowhere does not exist; give a local folder$"),
        ("bug", EngineError, r"cannot start: KeyError at pool_clerks.py:\d+: 'a mistake in the recipe'$"),
        ("die", EngineError, r"ended before it could answer \(killed by SIGKILL\)"),
    ],
)
def test_processes_that_cannot_start_stop_the_run(
    trouble: str, kind: type[EmberfedError], words: str, tmp_path: Path
) -> None:
    engine = pool(tmp_path, trouble=trouble)
    with pytest.raises(kind, match=words):
        list(engine.map([job("ann"), job("bob"), job("cleo")]))
    engine.close()
    wait_until_gone({int(path.name.rpartition(" ")[2]) for path in tmp_path.glob("opened by *")})


def test_closing_ends_processes_whatever_they_do(tmp_path: Path) -> None:
    """One is at work, the other idle; closing again, and asking nothing more, does no harm."""
    engine = pool(tmp_path)
    asked = engine.map([job("ann", "wait for ever"), job("bob")])
    assert next(asked).client == "bob"
    wait_for(tmp_path / "ann waits")
    numbers = {int(path.name.rpartition(" ")[2]) for path in tmp_path.glob("opened by *")}
    assert len(numbers) == 2
    engine.close()
    assert not any(alive(pid) for pid in numbers)
    engine.close()


PARENT = """
import sys
from pathlib import Path
from typing import Any
from pool_clerks import Clerk, Desk, job
from emberfed.cli.stopping import Stop
from emberfed.engines.pool import PoolConfig, PoolEngine
folder = Path(sys.argv[1])
engine = PoolEngine(PoolConfig(), Clerk(folder, "server"), Desk(folder))
try:
    with Stop().on_signals():
        list(engine.map([job("ann", "wait for ever"), job("bob", "wait for ever")]))
except KeyboardInterrupt:
    pass
finally:
    engine.close()
    (folder / "closed").touch()
"""
"""As a user's script: nothing guards it from being run again in other processes."""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_orphans_are_left(number: signal.Signals, tmp_path: Path) -> None:
    """Both processes are at work, and would be for long."""
    script = tmp_path / "script.py"
    script.write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen(
        [sys.executable, script, tmp_path], env=environment, stderr=subprocess.PIPE, process_group=0
    )
    try:
        wait_for(tmp_path / "ann waits")
        wait_for(tmp_path / "bob waits")
        numbers = {int(path.name.rpartition(" ")[2]) for path in tmp_path.glob("opened by *")}
        assert len(numbers) == 2
        assert all(alive(pid) for pid in numbers)
        # A terminal sends Ctrl-C to the whole group, and the processes are to leave it to the server.
        os.killpg(parent.pid, number) if number == signal.SIGINT else parent.send_signal(number)
        _, said = parent.communicate(timeout=300)
    finally:
        parent.kill()
        parent.wait()
    wait_until_gone(numbers)
    assert (tmp_path / "closed").exists() == (number != signal.SIGKILL)
    assert b"Traceback" not in said, said.decode()


# ------------------------------------------------------------------------------------------ configuration


def test_there_is_one_process_for_each_device(tmp_path: Path) -> None:
    engine = PoolEngine(PoolConfig(devices=["cpu", "cpu"]), Clerk(tmp_path, "server"), Desk(tmp_path))
    replies = list(engine.map([job("ann", "wait bob waits"), job("bob", "wait ann waits")]))
    engine.close()
    assert len(pids(replies)) == 2
    assert sorted(reply.upload for reply in replies if isinstance(reply, Reply)) == [b"ann cpu", b"bob cpu"]


def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    engine = PoolEngine(PoolConfig(devices=["cpu", "cuda:99"]), Clerk(tmp_path, "server"), Desk(tmp_path))
    with pytest.raises(EngineError, match=r"^engine.devices names 'cuda:99', but torch finds \d+ CUDA devices here"):
        list(engine.map([job("ann")]))
    engine.close()
    assert list(tmp_path.iterdir()) == []


def test_an_engine_without_a_recipe_says_so(tmp_path: Path) -> None:
    engine: Engine = PoolEngine(PoolConfig(), Clerk(tmp_path, "server"))
    with pytest.raises(EngineError, match="no recipe"):
        list(engine.map([job("ann")]))
    engine.close()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"processes": 0}, "greater than or equal to 1"),
        ({"processes": 3, "devices": ["cpu", "cpu"]}, "processes is 3, but devices names 2"),
        ({"devices": []}, "at least 1 item"),
        ({"devices": ["gpu"]}, "should match pattern"),
        ({"workers": 2}, "unknown key 'engine.workers'"),
    ],
)
def test_mistakes_in_the_section_are_found(values: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(PoolConfig, values, "engine")


def test_the_section_can_be_written_out_and_read_again() -> None:
    for given in ({}, {"processes": 5}, {"devices": ["cuda:0", "cuda:1", "cuda:1"]}):
        config = PoolConfig.model_validate(given)
        assert PoolConfig.model_validate(config.model_dump(mode="json")) == config
    assert PoolConfig().places == [None, None]
    assert PoolConfig(devices=["cuda:0", "cpu", "cpu"]).places == ["cuda:0", "cpu", "cpu"]


# ------------------------------------------------------------------------------------------ whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReusedPool]:
    reused = ReusedPool(tmp_path_factory.mktemp("pool"))
    yield reused
    reused.close()


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return Vision.made(tmp_path_factory.mktemp("vision"))


OFTEN = ("a3smoe", "flora", "flux")
"""One without memory, one that changes the base, one with idle work; `make test-slow` asks all."""


@pytest.mark.parametrize(
    "method", [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in method_names()]
)
def test_every_method_has_the_local_engines_bits(
    method: str, runs: ReusedPool, tiny_model_folder: Path, tiny_data: Path, vision: Vision, tmp_path: Path
) -> None:
    """Training, surveys, clients' own models and idle work, in two processes whose weights are mapped."""
    sections: dict[str, Any] = {
        "method": {"name": method},
        "data": {"client_test_share": 0.3},
        "evaluation": {"every": 0, "max_examples": 2},
    }
    if load_method(method).AdapterConfig is HeadConfig:
        given = vision.config(**sections)
    else:
        given = config(tiny_model_folder, tiny_data, **sections)
    materials = assembly.Materials()
    folders = [played(given, tmp_path / "local", materials), runs.run(given, tmp_path / "pool", materials)]
    here, there = (
        (bits(folder.path), [line for line in folder.metrics() if line["event"] == "personal"]) for folder in folders
    )
    assert there == here
    assert len(here[0]) >= 4
    assert len(here[1]) == 2 * 4


@pytest.mark.slow
def test_a_run_with_processes_from_start_to_report(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """As users start it; a run may also begin with one engine and go on with another."""
    given = config(tiny_model_folder, tiny_data, evaluation={"every": 0, "max_examples": 2})
    local = emberfed.run(given, output=tmp_path / "local")
    before = psutil.Process().children()
    run = emberfed.run({**given, "engine": {"name": "pool"}}, overrides=["training.rounds=1"], output=tmp_path / "pool")
    assert psutil.Process().children() == before, "the run took its processes with it"
    written = yaml.safe_load((run.path / "config.yaml").read_text())
    assert written["engine"] == {"name": "pool", "processes": None, "devices": None}
    (run.path / "config.yaml").write_text(yaml.safe_dump({**written, "engine": {"name": "local"}}))
    emberfed.resume(run.path, rounds=2)
    assert bits(run.path) == bits(local.path)
