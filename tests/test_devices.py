"""Devices: data sheets, the page made of them, and configurations that name one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from emberfed.clients import ClientsConfig, Tier, resolve
from emberfed.devices import KNOWN, known_device, table
from emberfed.errors import ConfigError
from emberfed.sections import validate

DOCS = Path(__file__).parents[1] / "docs"
OWN = {
    "name": "box",
    "flops_per_second": 2e9,
    "memory_bytes_per_second": 4e9,
    "memory_bytes": 8_000_000_000,
    "disk_bytes_per_second": 5e8,
    "download_bytes_per_second": 1e6,
    "upload_bytes_per_second": 5e5,
}


def clients(*tiers: dict[str, Any]) -> dict[str, Any]:
    return {"count": 4, "tiers": [{"share": 1 / len(tiers), "top_k": 1, **tier} for tier in tiers]}


def test_a_device_has_the_stated_share_of_the_peaks_of_its_sheet() -> None:
    """RTX 4090: 165.2 TFLOP/s and 1008 GB/s; 30 % and 70 % of them are 49.56 TFLOP/s and 705.6 GB/s."""
    device = known_device("rtx4090")
    assert device.flops_per_second == pytest.approx(49.56e12)
    assert device.memory_bytes_per_second == pytest.approx(705.6e9)
    assert device.memory_bytes == 24 * 2**30


def test_peaks_that_sheets_do_not_state_follow_from_what_they_do() -> None:
    """The sources name cores, clocks and widths; the products are written out here.

    Phone: 4 units x 4 numbers x 2 FLOP x 3.3 GHz, and 2 x 4 x 2 x (3 x 3.2 + 2 x 3.0) GHz; 4800 MHz x 2 x 8 bytes.
    Laptop CPU: 8 cores x 2 x 8 x 2 FLOP x 3.3 GHz; 2 channels x 8 bytes x 5600 MT/s.
    Laptop GPU: 2 x 2 FLOP x 3072 cores x 2.37 GHz; 128 bit x 16 Gbit/s.
    """
    assert KNOWN["phone"].peak_flops_per_second == pytest.approx(105.6e9 + 249.6e9)
    assert KNOWN["phone"].peak_memory_bytes_per_second == pytest.approx(4800e6 * 2 * 8)
    assert KNOWN["laptop_cpu"].peak_flops_per_second == pytest.approx(8 * 2 * 8 * 2 * 3.3e9)
    assert KNOWN["laptop_cpu"].peak_memory_bytes_per_second == pytest.approx(2 * 8 * 5600e6)
    assert KNOWN["laptop_gpu"].peak_flops_per_second == pytest.approx(2 * 2 * 3072 * 2.37e9, rel=1e-3)
    assert KNOWN["laptop_gpu"].peak_memory_bytes_per_second == pytest.approx(128 / 8 * 16e9)


@pytest.mark.parametrize("name", KNOWN)
def test_every_sheet_names_its_source_and_says_what_is_assumed(name: str) -> None:
    sheet = KNOWN[name]
    assert sheet.url.startswith("https://")
    assert 0 < sheet.flops_efficiency < 1
    assert 0 < sheet.memory_efficiency < 1
    assert sheet.url in sheet.device.source
    assert "assumed" in sheet.device.source


def test_the_page_holds_the_table_as_the_sheets_have_it() -> None:
    assert table() in (DOCS / "clock.md").read_text(encoding="utf-8")


def test_a_tier_names_a_device_or_describes_one() -> None:
    named = validate(ClientsConfig, clients({"name": "a", "device": "l20"}, {"name": "b", "device": OWN}), "clients")
    first, second = resolve(named.tiers, 1, 1)
    assert first.device == known_device("l20")
    assert second.device is not None
    assert second.device.upload_bytes_per_second == 5e5
    again = validate(ClientsConfig, named.model_dump(mode="json"), "clients")
    assert again == named, "the resolved form holds all rates, so that it means the same for ever"


@pytest.mark.parametrize(
    ("device", "words"),
    [
        ("fone", r"clients.tiers.0.device.*'fone'.*did you mean 'phone'.*'rtx4090'"),
        ({**OWN, "flops": 1}, r"unknown key 'clients.tiers.0.device.flops'"),
        ({**OWN, "flops_per_second": 0}, r"clients.tiers.0.device.flops_per_second.*greater than or equal to 1"),
        ({**OWN, "memory_bytes": 1.5}, r"clients.tiers.0.device.memory_bytes.*integer"),
        ({key: OWN[key] for key in OWN if key != "disk_bytes_per_second"}, r"device.disk_bytes_per_second' is missing"),
        (7, r"clients.tiers.0.device.*expected a section with keys, found 7"),
    ],
)
def test_a_bad_device_is_told_by_its_key(device: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        validate(ClientsConfig, clients({"name": "a", "device": device}), "clients")


def test_all_tiers_have_a_device_or_none_has() -> None:
    with pytest.raises(ConfigError, match="either all tiers have a device, or none; 'b' have none"):
        validate(ClientsConfig, clients({"name": "a", "device": "l20"}, {"name": "b"}), "clients")


def test_a_tier_that_holds_some_experts_needs_no_top_k() -> None:
    tier = Tier(name="t", share=1.0, tuned_experts=2, held_experts=6)
    (budget,) = resolve([tier], 8, 64)
    assert (budget.top_k, budget.tuned_experts, budget.held_experts, budget.device) == (8, 2, 6, None)
    with pytest.raises(ValueError, match="exactly one of top_k and beta"):
        Tier(name="t", share=1.0, tuned_experts=2)


def test_nobody_tunes_more_than_it_holds() -> None:
    assert Tier(name="t", share=1.0, tuned_experts=6, held_experts=6).tuned_experts == 6
    with pytest.raises(ConfigError, match="tier 't' tunes 7 experts and holds 6; .*tuned_experts may be 6 at most"):
        validate(ClientsConfig, clients({"name": "t", "tuned_experts": 7, "held_experts": 6}), "clients")
    with pytest.raises(ConfigError, match="tiers.0.held_experts.*greater than or equal to 1"):
        validate(ClientsConfig, clients({"name": "t", "held_experts": 0}), "clients")
