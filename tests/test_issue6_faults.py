"""What careless users and hostile clients can do to rounds on few experts, their budgets, and the clients' clock."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compact_worlds import CompactWorld, one_tier
from federations import config

from emberfed.admission import Asked, payload_problem, problem_of
from emberfed.config import parse
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError, ModelError, RunFolderError
from emberfed.evaluation import Score, Scores
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.profiling import Profile
from emberfed.records import Bundle, ClientFailed, Job, Payload, Reply, Survey
from emberfed.seeds import Seeds
from emberfed.worker import MemoryFolder, Worker

DEVICE: dict[str, Any] = {
    "name": "mine",
    "flops_per_second": 1e12,
    "memory_bytes_per_second": 1e11,
    "memory_bytes": 10**10,
    "disk_bytes_per_second": 1e9,
    "download_bytes_per_second": 1e7,
    "upload_bytes_per_second": 1e6,
}
ROOM = {"tuned_experts": 4, "held_experts": 8}


def tiers(*devices: Any) -> dict[str, Any]:
    """A `clients` section of two tiers, on a device each."""
    pairs = zip(("a", "b"), devices, strict=True)
    return {"tiers": [{"name": name, "share": 0.5, "top_k": 2, **ROOM, "device": device} for name, device in pairs]}


def check_refused(words: str, **sections: Any) -> None:
    """Check that settings are refused in one line with these words, before anything is loaded."""
    with pytest.raises(ConfigError, match=words) as caught:
        parse(config(Path("no model"), Path("no data"), **{"method": {"name": "flux"}, **sections}))
    assert "\n" not in str(caught.value)


# Settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [key for key in DEVICE if key.endswith("per_second")])
def test_seconds_on_the_clock_stay_finite(rate: str) -> None:
    # A byte at 1e-320 bytes per second would be an infinity of seconds, which no table of a run can hold.
    device = {**DEVICE, rate: 1e-320}
    check_refused(f"device.{rate}': input should be greater than or equal to 1", clients=tiers(device, device))


def test_a_server_has_a_rate_that_seconds_can_be_made_of() -> None:
    clock = {"server": {"memory_bytes_per_second": 1e-320}}
    check_refused("clock.server.memory_bytes_per_second'", clients=tiers("h100", "h100"), clock=clock)


def test_a_device_s_memory_has_a_size_that_can_be_shown() -> None:
    device = {**DEVICE, "memory_bytes": 10**400}
    check_refused("device.memory_bytes'", clients=tiers(device, device))


def test_true_is_no_target() -> None:
    check_refused("targets must not hold true", clients=tiers("h100", "h100"), clock={"targets": [True]})


@pytest.mark.parametrize("key", ["coverage", "epsilon_rounds", "dimensions"])
def test_numbers_nothing_can_be_counted_to_are_refused(key: str) -> None:
    check_refused(f"'method.{key}': input should be less than or equal to", method={"name": "flux", key: 10**30})


# What comes back from clients --------------------------------------------------------------------------------------


META = {"examples": 5, "tokens": 40, "top_k": 2, "stats": {"loss_mean": 1.5, "flops": 10}}


@pytest.mark.parametrize("exploited", [[[1.0, 2], []], [[True, 2], []], [[1], [2]], [[2, 1], []], None, "[[1, 2], []]"])
def test_exploited_experts_are_those_that_were_asked_for_to_the_letter(exploited: Any) -> None:
    # Python calls 1.0, true and 1 equal; as ids in the server's state they would fail every other client.
    asked = Asked(1, "c0", {}, 2, exploited=[[1, 2], []])
    good = Payload(1, "c0", Bundle(meta={**META, "exploited": [[1, 2], []]}))
    assert payload_problem(good, asked) is None
    bad = replace(good, content=Bundle(meta={**META, "exploited": exploited}))
    assert "the client was given [[1, 2], []]" in (payload_problem(bad, asked) or "")


def test_a_k_is_a_whole_number() -> None:
    bad = Payload(1, "c0", Bundle(meta={**META, "top_k": 1.0}))
    assert "'top_k' is 1.0" in (payload_problem(bad, Asked(1, "c0", {}, 1)) or "")


def with_meta(text: str) -> bytes:
    """The bytes of a bundle whose meta is this text, which our own writer would not write."""
    header = json.dumps({"__metadata__": {"meta": text}}).encode()
    return len(header).to_bytes(8, "little") + header


@pytest.mark.parametrize("number", ["1e400", "-1e400", "NaN", "[" * 100_000])
def test_what_no_table_can_hold_is_refused_whatever_its_key(number: str) -> None:
    text = json.dumps({"round": 1, "client": "c0", "meta": {**META, "stats": {**META["stats"], "odd": 0}}})  # type: ignore[dict-item]
    upload = with_meta(text.replace('"odd": 0', f'"odd": {number}'))
    sender, problem = problem_of(Reply(1, "c0", upload, {}), {"c0": Asked(1, "c0", {}, 2)}, set())
    assert sender == "c0"
    assert "are not a bundle of tensors" in (problem or "")
    with pytest.raises(RunFolderError):
        Bundle.from_bytes(upload)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("flops", 1e30),
        ("flops", "1"),
        ("disk_bytes", "many"),
        ("disk_bytes", True),
        ("idle_flops", -1),
        ("memory_traffic_bytes", None),
        ("idle_memory_traffic_bytes", 10**400),
    ],
)
def test_work_the_clock_cannot_count_is_refused(key: str, value: Any) -> None:
    bad = Payload(1, "c0", Bundle(meta={**META, "stats": {"loss_mean": 1.5, "flops": 10, key: value}}))
    problem = payload_problem(bad, Asked(1, "c0", {}, 2)) or ""
    assert problem.startswith(f"'stats.{key}' must be a number")
    assert len(problem) < 150


# A client's memory -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tiny_model_folder: Path, tiny_data: Path) -> CompactWorld:
    """FLUX after a round."""
    made = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"}, clients=one_tier(top_k=2, **ROOM))
    made.play(1)
    made.assign(2)
    return made


def unasked(client: str, model: FoundationModel) -> Scores[Score]:
    raise AssertionError("nobody asks for scores")


def answered(world: CompactWorld, folder: Path, memory: Bundle) -> Reply | ClientFailed:
    """What c0 says in round 2 with this memory."""

    kept = MemoryFolder(folder)
    kept.write("c0", 1, memory)
    worker = Worker(world.method, world.model, world.clients, world.shard, kept, Seeds(0), unasked)
    return worker.answer(Job(2, "c0", world.download("c0", 2).to_bytes()))


def test_a_memory_as_it_was_left_is_good(world: CompactWorld, tmp_path: Path) -> None:
    assert isinstance(answered(world, tmp_path, world.memories["c0"]), Reply)


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        ("attention", "first layer", "not of the same layers and experts"),
        ("attention", "one number", "not of the same layers and experts"),
        ("attention", "nan", "attention of experts must be finite"),
        ("counts", "first layer", "not of the same layers and experts"),
        ("counts", "one number", "not of the same layers and experts"),
        ("counts", "negative", "frequencies of experts must be finite and not negative"),
        ("tokens", "zero", "frequencies of experts must be finite and not negative"),
        ("reached", "first layer", "its profile is of 1 examples"),
        ("reached", "more", r"its profile is of \d+ examples, and it has \d+; remove the client's memory"),
    ],
)
def test_a_profile_that_is_not_of_this_client_is_told_by_it(
    world: CompactWorld, tmp_path: Path, name: str, damage: str, words: str
) -> None:
    memory = world.memories["c0"]
    found = memory.tensors[name]
    spoiled = {
        "first layer": lambda: found[:1].clone(),
        "one number": lambda: found.reshape(-1)[0].clone(),
        "nan": lambda: torch.full_like(found, torch.nan),
        "negative": lambda: -found - 1,
        "zero": lambda: torch.zeros_like(found),
        "more": lambda: torch.cat([found, found]),
    }[damage]()
    reply = answered(world, tmp_path, Bundle({**memory.tensors, name: spoiled}, memory.meta))
    assert isinstance(reply, ClientFailed)
    with pytest.raises(ValueError, match=words):
        raise ValueError(reply.reason)
    assert "\n" not in reply.reason


def test_tensors_of_a_profile_go_together(world: CompactWorld) -> None:
    tensors = dict(world.memories["c0"].tensors)
    assert Profile.from_tensors(tensors).examples == world.clients["c0"].examples
    with pytest.raises(ModelError, match=r"\(2, 8\), \(2, 7\)"):
        Profile.from_tensors({**tensors, "reached": tensors["reached"][..., :7]})


def test_a_client_s_failure_is_one_short_line(world: CompactWorld, tmp_path: Path) -> None:
    def unread(client: str) -> Shard:
        raise RuntimeError("first\n  second: " + "x" * 5000)

    worker = Worker(world.method, world.model, world.clients, unread, MemoryFolder(tmp_path), Seeds(0), unasked)
    reply = worker.answer(Survey(1, "c0", b""))
    assert isinstance(reply, ClientFailed)
    assert "first second: xxx" in reply.reason
    assert "\n" not in reply.reason
    assert len(reply.reason) < 600
