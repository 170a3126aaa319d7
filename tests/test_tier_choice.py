"""Which tier a machine can afford: the choice, and what `doctor --measure` counts it with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psutil
import pytest
from commands import invoke, write_config
from federations import config
from hypothesis import given
from hypothesis import strategies as st

from emberfed import config as configuration
from emberfed.cli import affording, split
from emberfed.cli.plan import plan
from emberfed.devices import Device
from emberfed.tier_choice import Need, choose

GB = 10**9


def device(flops: float = 1e12, memory: float = 1e11, disk: float = 1e9) -> Device:
    """A device with these rates."""
    return Device(
        name="some",
        flops_per_second=flops,
        memory_bytes_per_second=memory,
        memory_bytes=8 * GB,
        disk_bytes_per_second=disk,
        download_bytes_per_second=1e6,
        upload_bytes_per_second=1e6,
    )


MACHINE = device()


def need(tier: str, memory_bytes: int, round_flops: int, own: Device | None = None, disk_bytes: int = 0) -> Need:
    return Need(tier, memory_bytes, round_flops, disk_bytes, own)


def test_the_largest_that_memory_has_room_for() -> None:
    """Of 2, 4 and 6 GB in 5 GB the second; largest is who computes most, not who stands last or holds most."""
    needs = [need("b", 4 * GB, 200), need("c", 6 * GB, 300), need("a", 2 * GB, 100)]
    found = choose(needs, 5 * GB, MACHINE)
    assert found.tier == "b"
    assert list(found.problems) == ["b", "c", "a"]
    assert found.problems["a"] == found.problems["b"] == ()
    assert found.problems["c"] == ("needs 6.00\xa0GB, 5.00\xa0GB is free",)
    assert choose(needs, 4 * GB, MACHINE).tier == "b", "what is free may be used to the last byte"
    assert choose(needs, 4 * GB - 1, MACHINE).tier == "a"
    assert choose([need("x", 2, 7), need("y", 1, 7)], 2, MACHINE).tier == "x", "of equals the first"


def test_none_may_fit() -> None:
    found = choose([need("a", 2, 1), need("b", 3, 2)], 1, MACHINE)
    assert found.tier is None
    assert all(found.problems.values())


@pytest.mark.parametrize(
    ("own", "disk_bytes", "problem"),
    [
        (device(), 1, None),
        (device(flops=2e12), 0, "its device 'some' computes 2.00\xa0TFLOP/s, this machine 1.00\xa0TFLOP/s"),
        (device(memory=2e11), 0, "its device 'some' moves 200\xa0GB/s, this machine 100\xa0GB/s"),
        (device(disk=2e9), 0, None),
        (device(disk=2e9), 1, "its device 'some' reads 2.00\xa0GB/s, this machine 1.00\xa0GB/s"),
        (device().model_copy(update={"upload_bytes_per_second": 1e9}), 1, None),
    ],
    ids=["as fast", "computes faster", "faster memory", "disk unused", "faster disk", "faster network"],
)
def test_a_tier_of_faster_devices_is_not_for_this_machine(own: Device, disk_bytes: int, problem: str | None) -> None:
    [found] = choose([need("a", 1, 1, own, disk_bytes)], 1, MACHINE).problems.values()
    assert found == (() if problem is None else (problem,))


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.sampled_from([None, 0.5, 1.0, 2.0])), max_size=6),
    st.integers(0, 9),
)
def test_the_choice_is_what_a_search_finds(rows: list[tuple[int, int, float | None]], free: int) -> None:
    """Oracle: take tiers out one after another, from the most FLOPs down, until one fits."""
    needs = [
        need(str(number), memory, flops, None if speed is None else device(flops=speed * 1e12))
        for number, (memory, flops, speed) in enumerate(rows)
    ]
    expected = None
    for number in sorted(range(len(rows)), key=lambda number: (-rows[number][1], number)):
        memory, _, speed = rows[number]
        if memory <= free and (speed is None or speed <= 1):
            expected = str(number)
            break
    found = choose(needs, free, MACHINE)
    assert found.tier == expected
    assert {tier for tier, problems in found.problems.items() if not problems} == {
        one.tier for one, (_, _, speed) in zip(needs, rows, strict=True) if one.memory_bytes <= free and speed != 2.0
    }


@pytest.fixture(scope="module")
def values(tiny_model_folder: Path, tiny_data: Path) -> dict[str, Any]:
    """Tiers small, middle and large, with 1, 2 and 4 experts."""
    return config(tiny_model_folder, tiny_data, training={"rounds": 1, "batch_size": 4})


def test_tiers_are_counted_with_the_same_data(values: dict[str, Any], tmp_path: Path) -> None:
    """One client alone needs what a plan says for it, whatever its tier; on 4 experts it computes more than on 1."""
    split.split(configuration.parse(values), tmp_path / "parts")
    checked = configuration.parse(values)
    found = affording.afforded(checked, tmp_path / "parts" / "c0", MACHINE, 10**12)
    assert [one.tier for one in found.needs] == ["small", "middle", "large"]
    flops = [one.round_flops for one in found.needs]
    assert flops == sorted(set(flops))
    assert found.choice.tier == "large"
    of_all = affording.afforded(checked, None, MACHINE, found.needs[1].memory_bytes)
    planned = {tier.tier: tier for tier in plan(checked)}
    for one in of_all.needs:
        assert one.memory_bytes >= planned[one.tier].memory.total_bytes, "the largest step of any client"
    assert [one.device for one in of_all.needs] == [None] * 3


def test_doctor_measures_and_suggests(values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiers fit; the third is of a device that no machine is."""
    split.split(configuration.parse(values), tmp_path / "parts")
    fast = device(flops=1e18).model_dump(mode="json")
    slow = device(flops=1e6, memory=1e6).model_dump(mode="json")
    tiers = [{**tier, "device": own} for tier, own in zip(values["clients"]["tiers"], (slow, slow, fast), strict=True)]
    clients = {**values["clients"], "tiers": tiers}
    file = write_config(tmp_path / "tiny.yaml", {**values, "clients": clients})
    monkeypatch.chdir(tmp_path)
    result = invoke("doctor", file, "--measure", "--data", tmp_path / "parts" / "c0", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert document["device"]["name"] == "measured"
    told = document["afforded"]
    assert told["tier"] == "middle"
    assert 0 < told["free_memory_bytes"] <= psutil.virtual_memory().total
    assert [tier["problems"] for tier in told["tiers"][:2]] == [[], []]
    [faster, *_] = told["tiers"][2]["problems"]
    assert faster.startswith("its device 'some' computes")
    [check] = [check for check in document["checks"] if check["name"] == "tier"]
    assert check == {"name": "tier", "state": "ok", "detail": "this machine can afford --tier middle"}


def test_what_cannot_be_counted_is_a_warning_that_says_why(values: dict[str, Any], tmp_path: Path) -> None:
    """As on a client that does not have the server's data: how fast the machine is, is told all the same."""
    absent = {**values, "data": {**values["data"], "path": str(tmp_path / "of-the-server.jsonl")}}
    found = affording.measured(configuration.parse(absent), None, MACHINE, 10**12)
    assert found.json() == {"device": MACHINE.model_dump(mode="json"), "afforded": None}
    assert found.check().state == "warning"
    assert "of-the-server.jsonl" in found.check().detail
    assert "--data PATH" in found.check().detail
    assert len(found.tables()) == 1


def test_tables_say_why_a_tier_does_not_fit() -> None:
    needs = (need("a", 2 * GB, 10**12), need("b", 4 * GB, 2 * 10**12))
    for free, state, words in ((3 * GB, "ok", "--tier a"), (GB, "warning", "none of clients.tiers")):
        found = affording.Measured(MACHINE, affording.Afforded(needs, free, choose(needs, free, MACHINE)))
        assert found.check().state == state
        assert words in found.check().detail
        *_, table, line = found.tables()
        verdicts = [str(cell) for cell in table.columns[-1].cells]  # type: ignore[union-attr]
        assert verdicts[1].startswith("needs 4.00\xa0GB")
        assert (verdicts[0] == "the largest that fits") == (state == "ok")
        assert "is free now" in str(line)


def test_data_is_for_measuring(tmp_path: Path) -> None:
    result = invoke("doctor", "--data", tmp_path)
    assert result.exit_code == 2
    assert "--measure" in result.stderr
