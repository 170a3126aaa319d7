"""FMD: experts on disk, some of them held in memory: the same result to the bit, in fewer bytes from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_lora_methods import World

from emberfed.errors import ConfigError
from emberfed.models.footprint import memory_by_module, total
from emberfed.models.offloaded import OffloadedWeight, disk_bytes_read
from emberfed.models.stacked import EXPERT_WEIGHTS
from emberfed.records import Payload

EXPERT_BYTES = 3 * 16 * 32 * 4
"""Of the tiny model: three matrices between 32 hidden and 16 of an expert, in float32."""


def tiers(*held: int | None) -> list[dict[str, Any]]:
    """Tiers that differ in how many experts they hold."""
    rooms = [{} if number is None else {"held_experts": number} for number in held]
    return [{"name": f"t{n}", "share": 1 / len(held), "top_k": 2, **room} for n, room in enumerate(rooms)]


def world(model: Path, data: Path, *held: int | None) -> World:
    return World(model, data, method={"name": "fmd"}, clients={"tiers": tiers(*held)})


def trained(found: World, client: str = "c0") -> Payload:
    return found.fit(1, client)


def test_held_experts_change_nothing_but_what_is_read(tiny_model_folder: Path, tiny_data: Path) -> None:
    """None of 16 experts held, 6, and all: the latter are read once, and not again."""
    uploads = [trained(world(tiny_model_folder, tiny_data, held)).content for held in (None, 6, 16)]
    first, *others = uploads
    read = [upload.meta["stats"]["disk_bytes"] for upload in uploads]
    assert read[0] > read[1] > read[2] == 16 * EXPERT_BYTES
    for other in others:
        assert other.tensors.keys() == first.tensors.keys()
        for name, tensor in first.tensors.items():
            assert torch.equal(other.tensors[name], tensor), name
        assert other.meta["stats"]["losses"] == first.meta["stats"]["losses"]


def test_it_is_fedit_on_a_base_in_memory(tiny_model_folder: Path, tiny_data: Path) -> None:
    own = trained(world(tiny_model_folder, tiny_data, 5)).content
    fedit = World(
        tiny_model_folder,
        tiny_data,
        method={"name": "homolora", "rank": "adapter"},
        clients={"tiers": tiers(None)},
    )
    expected = trained(fedit).content
    assert own.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(own.tensors[name], tensor) for name, tensor in expected.tensors.items())


def test_which_experts_are_held(tiny_model_folder: Path, tiny_data: Path) -> None:
    """5 in 2 layers are the first 3 of the lower and the first 2 of the upper; reading those costs nothing."""
    found = world(tiny_model_folder, tiny_data, 5)
    model, client = found.model, found.clients["c0"]
    before = total(memory_by_module(model.lm)).stored_bytes
    with found.method.held(model, found.method.dispatch(found.state, client, 1), client) as held:
        assert held.disk_bytes == 5 * EXPERT_BYTES
        assert (held.model, held.compact, model.top_k) == (model, None, model.native_top_k)
        assert total(memory_by_module(model.lm)).stored_bytes == before + 5 * EXPERT_BYTES
        for block, share in zip(model.blocks, (3, 2), strict=True):
            for expert in range(8):
                already = disk_bytes_read(model.lm)
                for name in EXPERT_WEIGHTS:
                    weight = getattr(block.experts, name)
                    assert isinstance(weight, OffloadedWeight)
                    weight.expert(expert, torch.float32)
                assert disk_bytes_read(model.lm) - already == (0 if expert < share else EXPERT_BYTES)
    assert total(memory_by_module(model.lm)).stored_bytes == before


def test_what_cannot_be_held(tiny_model_folder: Path, tiny_data: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"tier 't1' holds 17 experts, but the model has 2 layers of 8; .* 16 at most"
    ):
        world(tiny_model_folder, tiny_data, 16, 17)
    with pytest.raises(ConfigError, match=r"this model's are in memory; set model\.expert_storage=disk"):
        World(tiny_model_folder, tiny_data, method={"name": "fmd"}, model={"expert_storage": "memory"})
