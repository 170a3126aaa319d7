"""Counted memory of training some experts of a compact model: against a process's peak, and inside a hard limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model
from test_costs_memory import QUIET

from emberfed.memory import Step, count_saved, tuning_memory
from emberfed.models import expert_tuning
from emberfed.models.compact import Cluster, LayerPlan, compacted
from emberfed.models.expert_values import ExpertValues

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

COMMON = """
import ctypes, gc, json, re, resource, sys
from pathlib import Path
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM
from test_costs_memory import shard
from emberfed import costs
from emberfed.memory import Step, tuning_memory
from emberfed.models import expert_tuning
from emberfed.models.compact import Cluster, LayerPlan, compacted
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import offload_experts
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig

sizes = dict(hidden_size=512, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, num_experts=32)
torch.manual_seed(0)
lm = OlmoeForCausalLM(OlmoeConfig(**sizes, vocab_size=1024, pad_token_id=0, eos_token_id=1))
offload_experts(lm)
model = FoundationModel(lm)
TUNED = (3, 8)


def plan_of(held):
    # Two tuned, the rest in as many clusters as there is room for, neighbours together.
    rest, clusters = [expert for expert in range(32) if expert not in TUNED], held - len(TUNED)
    parts = [rest[len(rest) * place // clusters : len(rest) * (place + 1) // clusters] for place in range(clusters)]
    return (LayerPlan(TUNED, tuple(Cluster(tuple(part), (1 / len(part),) * len(part)) for part in parts)),) * 2


def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


def train(tuned, sequences, length):
    config = TrainingConfig(batch_size=sequences, max_steps=2)
    return Trainer(config).train(model, tuned, shard(2 * sequences, length), "c", 1, Seeds(0))


rows = {0: TUNED, 1: TUNED}
"""
"""A model of 200 MB, almost all of it experts, which are on disk."""

PEAK = (
    COMMON
    + """
values = ExpertValues(model, {}, {}, 1.0)


def measured(held, tune, sequences, length):
    tensors = expert_tuning.initial(model, rows, tune, 4, torch.Generator().manual_seed(0))
    before = resident()
    with costs.measuring(torch.device("cpu")) as peak, compacted(model, plan_of(held), values) as compact:
        with expert_tuning.attached(model, tensors, rows, 16.0) as tuned:
            stats = train(tuned, sequences, length)
        pairs = [layer.rows / stats.tokens for layer in compact.take()]
        weights = [getattr(block.experts, name) for block in model.blocks for name in ("gate_up_proj", "down_proj")]
        slots = sum(weight.nbytes for weight in weights)
        step = Step(sequences, length, length // 2)
        counted = tuning_memory(model, compact, tensors, rows, step, stats.counts_LE > 0, pairs)
    return {"measured": peak.bytes - before, "slots": slots, "pairs": pairs, **counted.json()}


measured(2 + 1, "full", 2, 16)  # what libraries and Python hold from then on
for tune in ("lora", "full"):
    for held in (32, 16, 8):
        print(json.dumps({"tune": tune, "held": held, **measured(held, tune, 4, 128)}))
"""
)
"""Trains at each budget; prints what the process grew by, and what was counted."""


def child(code: str, *arguments: str) -> list[dict[str, Any]]:
    """What it prints, line by line."""
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.slow
@linux
def test_a_process_grows_by_what_is_counted_and_less_with_fewer_experts() -> None:
    """Experts on disk, 32, 16 and 8 of 32 held: resident memory within 10 %. `-s` shows the figures."""
    found = child(PEAK)
    for row in found:
        row["counted"] = row["slots"] + row["adapter_bytes"] + row["optimizer_bytes"] + row["working_bytes"]
        print("{tune}, {held} of 32:".format(**row), end=" ")
        print(f"counted {row['counted'] / 1e6:.1f} MB, measured {row['measured'] / 1e6:.1f} MB,", end=" ")
        print(f"ratio {row['counted'] / row['measured']:.3f}; slots {row['slots'] / 1e6:.1f} MB, pairs {row['pairs']}")
    assert len({row["weight_bytes"] - row["slots"] for row in found}) == 1  # all that is not of experts
    for row in found:
        assert row["counted"] == pytest.approx(row["measured"], rel=0.1)
    for tune in ("lora", "full"):
        for figure in ("counted", "measured", "total_bytes"):
            grown = [row[figure] for row in found if row["tune"] == tune]
            assert grown[0] > grown[1] > grown[2]


LIMITED = (
    COMMON
    + """
tune = sys.argv[1]
tensors = expert_tuning.initial(model, rows, tune, 4, torch.Generator().manual_seed(0))
values = ExpertValues(model, {}, {}, 1.0)


def losses(held):
    with compacted(model, plan_of(held), values), expert_tuning.attached(model, tensors, rows, 16.0) as tuned:
        return train(tuned, 2, 64).losses


def in_use():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return 1024 * int(re.search(r"VmData:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


with compacted(model, plan_of(3), values) as compact:
    counted = tuning_memory(model, compact, tensors, rows, Step(2, 64, 32))
losses(3)
weights = [getattr(block.experts, name) for block in model.blocks for name in ("gate_up_proj", "down_proj")]
experts = sum(weight.disk_bytes for weight in weights)
budget = experts // 4 + counted.step_bytes + experts // 16
resource.setrlimit(resource.RLIMIT_DATA, (in_use() + budget, resource.RLIM_INFINITY))
inside = losses(8)
try:
    losses(32)
    fits = True
except RuntimeError as error:
    fits = "allocate memory" not in str(error)
resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps({"budget": budget, "experts": experts, "inside": inside, "free": losses(8), "all_fit": fits}))
"""
)
"""Trains with a limit on what may be allocated: room for a quarter of the experts, a step, and a sixteenth to spare."""


@pytest.mark.slow
@linux
@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_client_with_room_for_a_quarter_of_the_experts_trains_in_that_room(tune: str) -> None:
    """The same losses, bit for bit, as without the limit, in which all experts do not fit."""
    (row,) = child(LIMITED, tune)
    assert row["budget"] < row["experts"]
    assert row["inside"] == row["free"]
    assert len(row["inside"]) == 2
    assert not row["all_fit"]


def test_more_pairs_keep_more() -> None:
    """Between one pair a token and as many as slots, in a straight line; what a layer's tokens do is its own."""
    model = tiny_model()
    weights = (0.5, 0.5)
    plan = (
        LayerPlan((0, 1), tuple(Cluster((e, e + 1), weights) for e in (2, 4, 6))),
        LayerPlan((0,), (Cluster(tuple(range(1, 8)), (0.4, *(0.1,) * 6)),)),
    )
    rows = {0: (0, 1), 1: (0,)}
    tensors = expert_tuning.initial(model, rows, "lora", 2, torch.Generator().manual_seed(0))
    step = Step(4, 32, 16)
    with model.active_experts(4), compacted(model, plan, ExpertValues(model, {}, {}, 1.0)) as compact:

        def kept(first: float, second: float) -> int:
            return tuning_memory(model, compact, tensors, rows, step, pairs_L=(first, second)).activation_bytes

        whole = tuning_memory(model, compact, tensors, rows, step)
        assert kept(4, 2) == whole.activation_bytes
        assert kept(4, 2) - kept(3, 2) == kept(3, 2) - kept(2, 2) > 0
        assert kept(4, 2) - kept(4, 1.5) == kept(4, 1.5) - kept(4, 1) > 0
        assert not any(work.rows for work in compact.take())
        with expert_tuning.attached(model, tensors, rows, 1.0) as attached, compact.sending(4):
            assert sum(count_saved(model, attached.parameters, 4, 32)) == whole.activation_bytes


def test_parts_of_a_step_of_tuned_experts() -> None:
    """OLMoE, hidden 32, expert hidden 16: two tuned experts of three matrices of 512 numbers; one is reached."""
    model = tiny_model()
    plan = (LayerPlan((1, 6), (Cluster((0, 2, 3, 4, 5, 7), (1 / 6,) * 6),)), LayerPlan(tuple(range(8)), ()))
    rows = {0: (1, 6)}
    tensors = expert_tuning.initial(model, rows, "full", 2, torch.Generator().manual_seed(0))
    before = sum(4 * weight.numel() for weight in model.lm.parameters()) + 2 * 4 * 4  # positions are buffers
    touched_LE = torch.zeros(2, 8, dtype=torch.bool)
    touched_LE[0, 6] = touched_LE[0, 7] = True
    with compacted(model, plan, ExpertValues(model, {}, {}, 1.0)) as compact:
        found = tuning_memory(model, compact, tensors, rows, Step(2, 8, 4), touched_LE)
    assert found.weight_bytes == before - 5 * 3 * 512 * 4
    assert (found.adapter_bytes, found.gradient_bytes) == (2 * 3 * 512 * 4, 3 * 512 * 4)
    assert found.optimizer_bytes == 2 * found.gradient_bytes
