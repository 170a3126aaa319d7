"""Flower's simulation runtime with Ray's real processes: what clients do there, what goes wrong, and what stays behind.

Ray takes seconds to start, so tests share engines where they can.
"""

from __future__ import annotations

import os
import pickle
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import psutil
import pytest
import torch
from federations import config

from emberfed.config import parse
from emberfed.engine import Clients, IdleTime, Recipe, engine_names, load_engine
from emberfed.engines.flower_simulation import FlowerSimulationConfig, FlowerSimulationEngine
from emberfed.errors import ConfigError, DataError, EngineError, StorageError
from emberfed.flower import simulation
from emberfed.flower.wire import Asked, Hello, asked
from emberfed.records import ClientFailed, Job, Question, Reply


@final
class _Clients(Clients):
    """Clients that keep a diary in a folder, and do what their download says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        word = question.download.decode()
        self._write(question, "began")
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "full":
            raise StorageError("could not write: no space left")
        if word == "ill":
            return ClientFailed(question.round, question.client, "sleepless")
        if word == "meet":  # two that meet are at work at the same time
            self._write(question, "met")
            end = time.monotonic() + 60
            while len(list(self._folder.glob("* met"))) < 2 and time.monotonic() < end:
                time.sleep(0.05)
        upload = f"{question.client} {os.getpid()} {torch.get_num_threads()}".encode()
        return Reply(question.round, question.client, upload, {"seconds": 1.0, "peak_memory_bytes": 1.0})

    def idle(self, question: Question, /) -> float:
        if (self._folder / "full").exists():
            raise StorageError("could not write: no space left")
        self._write(question, "rested")
        return 0.25

    def _write(self, question: Question, what: str) -> None:
        (self._folder / f"{question.round} {question.client} {what}").touch()


@final
@dataclass(frozen=True)
class _Recipe(Recipe):
    """Opens the clients of a folder; counts how often."""

    folder: Path
    trouble: str = ""

    @contextmanager
    def open(self) -> Iterator[Clients]:
        if self.trouble == "data":
            raise DataError("there is no data")
        if self.trouble == "bug":
            raise KeyError("nobody foresaw")
        (self.folder / f"opened {os.getpid()} {time.monotonic_ns()}").touch()
        yield _Clients(self.folder)


@final
class _Nobody(Clients):
    """The server's own clients, which are not asked."""

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        raise AssertionError("asked here")

    def idle(self, question: Question, /) -> float:
        raise AssertionError("asked here")


def engine(folder: Path, trouble: str = "", **settings: Any) -> FlowerSimulationEngine:
    return FlowerSimulationEngine(FlowerSimulationConfig(**settings), _Nobody(), _Recipe(folder, trouble))


def jobs(words: Sequence[str], round: int = 1) -> Iterator[Job]:
    return (Job(round, f"c{index}", word.encode()) for index, word in enumerate(words))


def listening(process: psutil.Process) -> set[str]:
    """Addresses that a process and its children listen on."""
    family = [process, *process.children(recursive=True)]
    sockets = [socket for one in family for socket in one.net_connections("inet") if socket.status == "LISTEN"]
    return {socket.laddr.ip.removeprefix("::ffff:") for socket in sockets}


@pytest.mark.slow
def test_a_federation_in_ray_s_processes(tmp_path: Path) -> None:
    """One engine through its life: replies, rest, failures, a process that is killed, and nothing left in the end."""
    here = psutil.Process()
    environment, before = dict(os.environ), {child.pid for child in here.children(recursive=True)}
    heard: list[int] = []
    handler = signal.signal(signal.SIGTERM, lambda number, _: heard.append(number))
    sim = engine(tmp_path, processes=2)
    try:
        replies = list(sim.map(jobs(["meet", "meet", "ill", *["work"] * 7])))
        assert sorted(reply.client for reply in replies) == [f"c{index}" for index in range(10)]
        assert [reply for reply in replies if isinstance(reply, ClientFailed)] == [ClientFailed(1, "c2", "sleepless")]
        told = [reply.upload.decode().split() for reply in replies if isinstance(reply, Reply)]
        assert sorted(words[0] for words in told) == sorted({f"c{index}" for index in range(10)} - {"c2"})
        assert len({words[1] for words in told}) == 2, "two processes"
        assert {words[2] for words in told} == {str(torch.get_num_threads())}
        assert listening(here) <= {"127.0.0.1", "::1"}
        assert dict(os.environ) == environment
        os.kill(os.getpid(), signal.SIGTERM)
        assert heard == [signal.SIGTERM]

        assert list(sim.map([])) == []
        assert len(list(tmp_path.glob("1 * rested"))) == 10
        idle = sim.take_idle()
        assert idle.work_seconds == pytest.approx(2.5)
        assert 0 <= idle.waited_seconds <= 2.5
        assert sim.take_idle() == IdleTime()

        replies = list(sim.map(jobs(["die", "work", "work", "work"], round=2)))
        (dead,) = [reply for reply in replies if isinstance(reply, ClientFailed)]
        assert dead.client == "c0"
        assert "the process that it was in died" in dead.reason
        assert "\n" not in dead.reason
        replies = list(sim.map(jobs(["work"] * 6, round=3)))
        assert all(isinstance(reply, Reply) for reply in replies), replies
        assert len(list(tmp_path.glob("opened *"))) == 4, (
            "once in each process, and in two after that in which the client died, and died again"
        )
        with pytest.raises(StorageError, match="no space left"):
            list(sim.map(jobs(["work", "full"], round=5)))
        (tmp_path / "full").touch()
        list(sim.map(jobs(["work"], round=6)))
        with pytest.raises(StorageError, match="no space left"):
            list(sim.map([]))
    finally:
        started = time.monotonic()
        family = [child for child in here.children(recursive=True) if child.pid not in before]
        sim.close()
        signal.signal(signal.SIGTERM, handler)
    sim.close()
    assert time.monotonic() - started < 60
    assert not [process for process in family if simulation._is_alive(process)]
    assert dict(os.environ) == environment


@pytest.mark.parametrize(
    ("trouble", "error", "words"),
    [("data", DataError, "there is no data"), ("bug", EngineError, "KeyError at test_flower_simulation.py:")],
)
def test_what_stops_a_process_from_loading_stops_the_run(
    trouble: str, error: type[Exception], words: str, tmp_path: Path
) -> None:
    """Told as a value by the process, here without one, and raised by the link; that way is another test's too."""
    work = simulation._Work(pickle.dumps(_Recipe(tmp_path, trouble)), torch.get_num_threads())
    (job,) = jobs(["work"])
    content = simulation._content(work, asked(Asked(Hello("run", {}), "", job)), simulation._answer)
    found = simulation._error(content.config_records["stopped"])
    assert type(found) is error
    assert words in str(found)


def test_nothing_starts_before_the_first_question(tmp_path: Path) -> None:
    sim = engine(tmp_path)
    assert list(sim.map([])) == []
    assert sim._link is None
    sim.close()


def test_what_cannot_start_says_so_before_anything_does(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="each need 2 GPUs, and there are 0; set fewer processes"):
        list(engine(tmp_path, gpus=0.6, processes=3).map(jobs(["work"])))
    with pytest.raises(EngineError, match="no recipe"):
        list(FlowerSimulationEngine(FlowerSimulationConfig(), _Nobody()).map(jobs(["work"])))
    assert not list(tmp_path.iterdir())


def test_the_engine_goes_by_its_name_in_configurations() -> None:
    assert "flower-simulation" in engine_names()
    assert load_engine("flower-simulation") is FlowerSimulationEngine
    given = config(Path("model"), Path("data"), engine={"name": "flower-simulation", "processes": 3})
    assert parse(given).engine == FlowerSimulationConfig(processes=3)
    with pytest.raises(ConfigError, match=r"engine.*in_flight is 2, which leaves some of 3 processes idle"):
        parse({**given, "engine": {**given["engine"], "in_flight": 2}})
    with pytest.raises(ConfigError, match="unknown engine 'flower-simulatoin'; did you mean 'flower-simulation'"):
        load_engine("flower-simulatoin")
