"""Deployments whose processes are killed, halted, stopped and starved, and what becomes of the run.

Faults are real signals and limits to real processes. Each test prints, as `-rP` shows, how long the federation took to
be whole again; docs/deployment/faults.md has what was measured.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from deployments import Grounds, grounds, here, lines, wait_until
from federations import bits
from test_deployment import of_three

from emberfed.records import Payload

QUICK = ("--set", "engine.poll_seconds=0.05")
LONG = {"rounds": 3, "batch_size": 1, "local_epochs": 10, "max_steps": 20}
"""Training that lasts long enough for its middle to be met."""
ENDLESS = {"rounds": 10_000, "max_steps": 1}


# ------------------------------------------------------------------------------------- looking at processes


def processes(place: Grounds) -> set[int]:
    """Return all that run in the federation's folder, whoever started them."""
    found = set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "cwd").readlink() == place.path and running(int(entry.name)):
                found.add(int(entry.name))
        except OSError:  # it ended meanwhile
            continue
    return found


def running(process: int) -> bool:
    """Tell whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def supernode(client: subprocess.Popen[bytes]) -> int:
    """Return the process of a client's SuperNode."""
    threads = Path(f"/proc/{client.pid}/task").iterdir()
    (found,) = {int(child) for one in threads for child in (one / "children").read_text().split()}
    return found


def superlink(place: Grounds) -> int:
    """Return the process of the SuperLink."""
    told: int = json.loads((place.path / "server-state/superlink/superlink.json").read_bytes())["process"]
    return told


# ------------------------------------------------------------------------------------------- looking at runs


def wait_for_round(place: Grounds, round: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a round is whole."""
    arrived(place, server, lambda: bool(rounds(place)) and rounds(place)[-1]["round"] >= round)


def rounds(place: Grounds) -> list[dict[str, Any]]:
    """Return the lines of whole rounds."""
    return lines(place.run, "round") if (place.run / "metrics.jsonl").exists() else []


def wait_for_training(place: Grounds, client: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until a client has its first job in hand: it has opened its part of the run, and not answered yet."""
    arrived(place, server, lambda: any((place.path / f"state-{client}").glob("*/data.json")))
    assert "round 1: " not in place.log(client), "training was over too soon for this test"


def wait_for_uploads(place: Grounds, round: int, count: int, server: subprocess.Popen[bytes]) -> None:
    """Wait until a round that is not whole has so many uploads."""
    folder = place.run / f"rounds/{round:04d}.partial/clients"
    until = time.monotonic() + 180
    while len(list(folder.glob("*.json"))) < count:  # the moment is short
        assert not rounds(place) or rounds(place)[-1]["round"] < round, "the round was over too soon for this test"
        assert server.poll() is None, "\n".join(place.everything())
        assert time.monotonic() < until, "\n".join(place.everything())
        time.sleep(0.001)


def halted_in_aggregation(place: Grounds, count: int, server: subprocess.Popen[bytes]) -> int:
    """Halt the server when it has all uploads of a round that is not whole; return the round."""
    until = time.monotonic() + 240
    while True:
        for folder in (place.run / "rounds").glob("*.partial/clients"):
            if len(list(folder.glob("*.json"))) == count:
                server.send_signal(signal.SIGSTOP)
                if folder.exists():
                    return int(folder.parent.stem)
                server.send_signal(signal.SIGCONT)
        assert server.poll() is None, "\n".join(place.everything())
        assert time.monotonic() < until, "\n".join(place.everything())
        time.sleep(0.001)


def written(folder: Path) -> dict[str, int]:
    """Return when each upload was written."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*.safetensors")}


def arrived(place: Grounds, server: subprocess.Popen[bytes], done: Callable[[], bool]) -> None:
    """Wait for something while the server runs."""
    wait_until(lambda: done() or server.poll() is not None, 240, lambda: "\n".join(place.everything()))
    assert done(), "\n".join(place.everything())


def failing(place: Grounds, server: subprocess.Popen[bytes], client: str, reason: str, after: int) -> int:
    """Wait for a round, after another, in which a client failed for a reason; return it."""

    def found() -> list[int]:
        return [
            line["round"]
            for line in rounds(place)
            if line["round"] > after and reason in line["failed"].get(client, "")
        ]

    arrived(place, server, lambda: bool(found()))
    return found()[0]


def replying(place: Grounds, server: subprocess.Popen[bytes], client: str, after: int) -> int:
    """Wait for a round, after another, in which a client took part; return it."""

    def found() -> list[int]:
        return [line["round"] for line in rounds(place) if line["round"] > after and client in line["replied"]]

    arrived(place, server, lambda: bool(found()))
    return found()[0]


def last(place: Grounds) -> int:
    """Return the newest whole round."""
    return int(rounds(place)[-1]["round"])


@contextmanager
def told(what: str) -> Iterator[None]:
    """Print how long the block took."""
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.1f} s")


def nobody_left(place: Grounds, but: set[int]) -> None:
    """Check that all processes have ended, but for some."""
    wait_until(lambda: processes(place) <= but, 20, lambda: f"left over: {processes(place) - but}")


# -------------------------------------------------------------------------------------------------- killed


@pytest.mark.slow
def test_a_superlink_killed_within_a_round_costs_no_work(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = of_three(tiny_model_folder, tiny_data, training={**LONG, "rounds": 2})
    values["clients"]["count"], values["clients"]["tiers"] = 1, [{**values["clients"]["tiers"][0], "share": 1.0}]
    local = here(values, tmp_path / "local")
    with grounds(tmp_path / "deployment", values) as place:
        server, clients = place.server(*QUICK), place.clients()
        wait_for_training(place, "c0", server)
        dead = superlink(place)
        os.kill(dead, signal.SIGKILL)
        with told("SuperLink killed; started again"):
            place.wait_for("server", "the SuperLink was gone and has been started again")
        with told("the round was done after that"):
            wait_for_round(place, 1, server)
        assert superlink(place) != dead
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert [client.poll() for client in clients.values()] == [None]
        assert place.log("c0").count("round 1: done") == 1, "it did not train again"
        assert bits(place.run) == bits(local)
        assert [line["failed"] for line in rounds(place)] == [{}, {}]
        clients["c0"].send_signal(signal.SIGINT)
        with told("Ctrl-C to a client that waits for a server; it had ended"):
            assert place.ended(clients["c0"]) == 130
        nobody_left(place, but=set())


@pytest.mark.slow
def test_a_superlink_killed_twice_under_three_clients(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """While all train, and while a round's uploads are coming in."""
    values = of_three(tiny_model_folder, tiny_data, training=LONG)
    local = here(values, tmp_path / "local")
    with grounds(tmp_path / "deployment", values) as place:
        server, clients = place.server(*QUICK), place.clients()
        wait_for_training(place, "c0", server)
        os.kill(superlink(place), signal.SIGKILL)
        with told("SuperLink killed while clients train; the round was done"):
            wait_for_round(place, 1, server)
        wait_for_uploads(place, 2, 1, server)
        os.kill(superlink(place), signal.SIGKILL)
        with told("SuperLink killed while uploads come; the round was done"):
            wait_for_round(place, 2, server)
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert [client.poll() for client in clients.values()] == [None] * 3
        assert bits(place.run) == bits(local)
        assert [line["failed"] for line in rounds(place)] == [{}] * 3


@pytest.mark.slow
def test_a_server_killed_at_three_moments_loses_nothing(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Within aggregation, between rounds, and with its SuperLink, as by a machine that loses power.

    With a method whose clients remember, in a federation of which some take part in each round.
    """
    values = of_three(tiny_model_folder, tiny_data, method={"name": "flame"}, training={"rounds": 12, "max_steps": 1})
    values["clients"]["per_round"] = 2
    local = here(values, tmp_path / "local")
    with grounds(tmp_path / "deployment", values) as place:
        server, clients = place.server(*QUICK), place.clients()
        round = halted_in_aggregation(place, 2, server)
        server.kill()
        server.wait()
        before = written(place.run / f"rounds/{round:04d}.partial/clients")
        assert len(before) == 2
        server = place.server(*QUICK, log="second")
        with told("server killed within aggregation; the round was done"):
            wait_for_round(place, round, server)
        assert written(place.run / f"rounds/{round:04d}/clients") == before, "nobody trained again"
        server.kill()
        server.wait()
        between = last(place)
        server = place.server(*QUICK, log="third")
        with told("server killed between rounds; the next was done"):
            wait_for_round(place, between + 1, server)
        server.kill()
        os.kill(superlink(place), signal.SIGKILL)
        server.wait()
        between = last(place)
        server = place.server(*QUICK, log="fourth")
        with told("server and SuperLink killed; the next round was done"):
            wait_for_round(place, between + 1, server)
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert [client.poll() for client in clients.values()] == [None] * 3, "no client was started again"
        assert bits(place.run) == bits(local)


@pytest.mark.slow
def test_a_client_killed_in_training_and_started_again_costs_no_round(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Its SuperNode dies with it, without a word: what was asked of it is asked again."""
    values = of_three(tiny_model_folder, tiny_data, training={**LONG, "rounds": 2})
    local = here(values, tmp_path / "local")
    with grounds(tmp_path / "deployment", values) as place:
        server, clients = place.server(*QUICK), place.clients()
        wait_for_training(place, "c0", server)
        node = supernode(clients["c0"])
        os.kill(node, signal.SIGKILL)
        clients["c0"].kill()
        clients["c0"].wait()
        place.client("c0", log="c0-again")
        with told("client killed with its SuperNode and started again; the round was done"):
            wait_for_round(place, 1, server)
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert "round 1: done" in place.log("c0-again")
        assert bits(place.run) == bits(local)
        assert [line["failed"] for line in rounds(place)] == [{}, {}]


# ------------------------------------------------------------------------------- failed, halted and stopped


@pytest.mark.slow
def test_clients_that_fail_are_left_out_by_name_and_come_back(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """One federation, one client after the other; at last the server is stopped, and goes on without one of them."""
    values = of_three(tiny_model_folder, tiny_data, training=ENDLESS)
    short = (*QUICK, "--set", "engine.return_seconds=2", "--set", "engine.deadline_seconds=20")
    with grounds(tmp_path / "deployment", values) as place:
        server, clients = place.server(*short), place.clients()
        wait_for_round(place, 1, server)

        # Killed; its SuperNode takes leave for it.
        node = supernode(clients["c0"])
        before = last(place)
        clients["c0"].kill()
        with told("client killed; a round ended without it"):
            failed = failing(place, server, "c0", "its node was not connected for 2 s (engine.return_seconds)", before)
        wait_until(lambda: not running(node), 20, lambda: "an orphaned SuperNode")
        assert rounds(place)[failed - 1]["replied"] == ["c1", "c2"]
        clients["c0"] = place.client("c0", log="c0-again")
        with told("client started again; it took part"):
            replying(place, server, "c0", failed)

        # Halted, as by a machine that is overwhelmed: its SuperNode still says that it lives.
        before = last(place)
        clients["c1"].send_signal(signal.SIGSTOP)
        with told("client halted; a round ended without it"):
            failed = failing(place, server, "c1", "no reply within 20 s (engine.deadline_seconds)", before)
        assert rounds(place)[failed - 1]["replied"] == ["c0", "c2"]
        clients["c1"].send_signal(signal.SIGCONT)
        with told("client goes on; it took part"):
            back = replying(place, server, "c1", failed)
        wait_for_round(place, back + 3, server)
        for upload in (place.run / "rounds").glob("[0-9][0-9][0-9][0-9]/clients/c1.safetensors"):
            assert Payload.open(upload).round == int(upload.parents[1].name), "no late reply was taken"
        assert not [line["refused"] for line in rounds(place) if line["refused"]]

        # Stopped by its user.
        node = supernode(clients["c2"])
        before = last(place)
        clients["c2"].send_signal(signal.SIGINT)
        with told("Ctrl-C to a client; it had ended"):
            assert place.ended(clients["c2"]) == 130
        assert not running(node)
        assert "Traceback" not in place.log("c2")
        failed = failing(place, server, "c2", "its node was not connected", before)

        # The server is stopped by its user.
        server.send_signal(signal.SIGINT)
        with told("Ctrl-C to the server; it had ended"):
            assert place.ended(server) == 130
        assert "stopped; finished clients are kept. Go on with: the same command" in place.log("server")
        assert "Traceback" not in place.log("server")
        nobody_left(
            place, but={process for one in ("c0", "c1") for process in (clients[one].pid, supernode(clients[one]))}
        )

        # It goes on while a client is away; with enough time the client comes into the round that waits for it.
        done = last(place)
        more = ("--set", f"training.rounds={done + 2}", "--set", "engine.deadline_seconds=200")
        server = place.server(*QUICK, *more, log="second")
        place.wait_for("second", f"round {done + 1} of {done + 2}")
        place.client("c2", log="c2-again")
        with told("client that was away when the server went on was started; its round was done"):
            wait_for_round(place, done + 1, server)
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert [line["failed"] for line in rounds(place)[-2:]] == [{}, {}]
        assert [line["round"] for line in rounds(place)] == list(range(1, done + 3))


@pytest.mark.slow
def test_a_client_that_comes_when_all_have_come_waits_for_another_run(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Who takes part is settled before the first round; one more client is let in, and asked nothing."""
    values = of_three(tiny_model_folder, tiny_data, training={"rounds": 2, "max_steps": 1})
    with grounds(tmp_path / "deployment", values) as place:
        two = ("--set", "clients.count=2")
        server = place.server(*QUICK, *two)
        early = [place.client("c0"), place.client("c2")]
        place.wait_for("server", "round 1 of 2")
        late = place.client("c1")
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert [line["replied"] for line in rounds(place)] == [["c0", "c2"]] * 2
        assert late.poll() is None
        server = place.server(*QUICK, output=place.path / "another", log="another")
        with told("another run with the late client was done"):
            assert place.ended(server) == 0, "\n".join(place.everything())
        assert {name for line in lines(place.path / "another", "round") for name in line["replied"]} == {
            "c0",
            "c1",
            "c2",
        }
        assert [client.poll() for client in (*early, late)] == [None] * 3


@pytest.mark.slow
def test_two_servers_at_once_share_clients_and_not_their_memories(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Two runs of unlike cohorts: a memory that got into the other run would change its bits."""
    values = of_three(tiny_model_folder, tiny_data, method={"name": "flame"}, training={"rounds": 4, "max_steps": 2})
    local = bits(here(values, tmp_path / "local"))
    some = {**values, "clients": {**values["clients"], "per_round": 2}}
    local_of_some = bits(here(some, tmp_path / "local-of-some"))
    with grounds(tmp_path / "deployment", values) as place:
        clients = place.clients()
        first = place.server(*QUICK)
        place.wait_for("server", "waiting for 3 clients")
        link = superlink(place)
        second = place.server(*QUICK, "--set", "clients.per_round=2", output=place.path / "other", log="second")
        with told("two servers at once were done"):
            assert place.ended(first) == 0, "\n".join(place.everything())
            assert place.ended(second) == 0, "\n".join(place.everything())
        assert not running(link), "the last server ends the SuperLink"
        assert bits(place.run) == local
        assert bits(place.path / "other") == local_of_some
        assert len([folder for folder in (place.path / "state-c0").iterdir() if (folder / "data.json").exists()]) == 2
        assert "started again" not in "".join(place.everything())
        nobody_left(place, but={one for client in clients.values() for one in (client.pid, supernode(client))})


# ----------------------------------------------------------------------------------------------- full disks


@pytest.mark.slow
def test_full_disks_of_a_server_and_of_a_client(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands in for them, set on processes that are at work, and taken back."""
    values = of_three(tiny_model_folder, tiny_data, method={"name": "flame"}, training=ENDLESS)
    with grounds(tmp_path / "deployment", values) as place:
        server, clients = place.server(*QUICK), place.clients()
        wait_for_round(place, 1, server)

        before = last(place)
        unlimited = resource.prlimit(clients["c1"].pid, resource.RLIMIT_FSIZE)
        resource.prlimit(clients["c1"].pid, resource.RLIMIT_FSIZE, (50, unlimited[1]))
        with told("a client's disk is full; a round ended without it"):
            failed = failing(place, server, "c1", "could not write", before)
        assert rounds(place)[failed - 1]["replied"] == ["c0", "c2"]
        resource.prlimit(clients["c1"].pid, resource.RLIMIT_FSIZE, unlimited)
        with told("it has room again; it took part"):
            replying(place, server, "c1", failed)

        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (6000, unlimited[1]))
        with told("the server's disk is full; it had ended"):
            assert place.ended(server) == 7, "\n".join(place.everything())
        log = place.log("server")
        assert "could not write" in log
        assert "Go on with: the same command" in log
        assert "Traceback" not in log
        done = last(place)
        server = place.server(*QUICK, "--set", f"training.rounds={done + 2}", log="second")
        with told("the server was started again with room; a round was done"):
            wait_for_round(place, done + 1, server)
        assert place.ended(server) == 0, "\n".join(place.everything())
        assert [client.poll() for client in clients.values()] == [None] * 3
        assert [line["round"] for line in rounds(place)] == list(range(1, done + 3))
