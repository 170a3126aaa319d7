"""Counted memory: against what autograd keeps, what torch allocates, what a process grows by, and what is sent."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import CLASSIFIER_VARIANTS, FAMILY_VARIANTS, tiny_family_lm, token_ids, whole_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from emberfed import costs, memory
from emberfed.data.tokenise import Example, ResponseShard, ShardReport
from emberfed.memory import SavedBytes, Step, count_saved, training_memory
from emberfed.models import lora, sparse_adapter
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.head import initial_head
from emberfed.models.quantised import quantise_experts
from emberfed.records import ACTIVATION_COUNTS, Bundle, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig

VARIANTS = [name for names in FAMILY_VARIANTS.values() for name in names]
CLASSIFIERS = [name for names in CLASSIFIER_VARIANTS.values() for name in names]
FAMILIES = ("olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss")


@cache
def tiny(name: str) -> FoundationModel:
    return FoundationModel(tiny_family_lm(name, hidden_size=64, max_position_embeddings=128))


def adapter(model: FoundationModel, rank: int = 2, **options: bool) -> dict[str, torch.Tensor]:
    return lora.initial(model, lora.LoraConfig(rank=rank, **options), torch.Generator().manual_seed(0))


def shard(examples: int, length: int) -> ResponseShard:
    """Every second example is one token shorter, so that batches have padding; half of each carries loss."""
    draw = np.random.default_rng(0)
    made = [draw.integers(2, 64, length - index % 2).astype(np.int32) for index in range(examples)]
    report = ShardReport(examples, 0, 0, 0, 0)
    return ResponseShard(tuple(Example(ids, length // 2, "", "") for ids in made), report, 0)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_autograd_keeps_is_a_polynomial_of_the_batch(name: str) -> None:
    model = tiny(name)
    tensors = lora.initial(model, whole_adapter(model, 2), torch.Generator().manual_seed(0))
    with model.active_experts(min(3, model.largest_top_k)), lora.attached(model, tensors, 16.0) as attached:
        saved = SavedBytes.count(model, attached.parameters)
        for sequences, length in ((2, 9), (3, 20), (5, 33)):
            assert saved.parts(sequences, length) == count_saved(model, attached.parameters, sequences, length)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_what_autograd_keeps_of_a_classifier_is_one_too(name: str) -> None:
    model = FoundationModel(tiny_family_lm(name))
    image = model.shape.image
    with lora.attached(model, adapter(model), 16.0) as attached:
        saved = SavedBytes.count(model, attached.parameters)
        for sequences, length in ((2, 9), (3, 20), (5, 33)):
            length = length if image is None else image.positions
            assert saved.parts(sequences, length) == count_saved(model, attached.parameters, sequences, length)


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("name", ["vit", "roberta", "llama", "olmoe"])
def test_parts_of_a_step_with_a_sparse_adapter(name: str, top_k: int) -> None:
    """One position at K of 4 reaches K / 4 of the experts; gates and heads have gradients always."""
    model = FoundationModel(tiny_family_lm(name))
    config = sparse_adapter.SparseAdapterConfig(num_experts=4, expert_size=5)
    tensors = sparse_adapter.initial(model, config, torch.Generator().manual_seed(0))
    step = Step(1, 1, 1, adapter_top_k=top_k)
    counted = training_memory(model, tensors, step)
    experts = sum(4 * tensor.numel() for key, tensor in tensors.items() if sparse_adapter.is_expert(key))
    whole = costs.tensor_bytes(tensors)
    assert counted.gradient_bytes == experts * top_k / 4 + (whole - experts)
    assert (counted.adapter_bytes, counted.optimizer_bytes) == (whole, 2 * whole)
    touched_LM = torch.zeros(model.shape.num_layers, 4, dtype=torch.bool)
    touched_LM[0, 0] = True
    assert training_memory(model, tensors, step, touched_LM).gradient_bytes == experts / 8 + (whole - experts)


def test_a_head_alone_keeps_nothing_of_the_layers() -> None:
    model = FoundationModel(tiny_family_lm("vit"))
    counted = training_memory(model, initial_head(model), Step(4, 5, 1))
    assert counted.activation_bytes == 0
    assert counted.gradient_bytes == 4 * (5 * 32 + 5)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_training_a_classifier_allocates_what_is_counted(name: str) -> None:
    """Within 14 %: BERT's few hidden states are fewer than is counted, at so small a size."""
    model = FoundationModel(tiny_family_lm(name, **({"image_size": 32} if name == "vit" else {})))
    image, tensors = model.shape.image, adapter(model)
    step = Step(8, 64 if image is None else image.positions, 1)
    if image is None:
        mask = torch.ones(8, 64, dtype=torch.int64)
        mask[:, -1] = 0
        inputs = {"input_ids": token_ids(8, 64), "attention_mask": mask}
    else:
        inputs = {"pixel_values": torch.zeros(8, image.channels, image.height, image.width)}

    def train() -> torch.Tensor:
        optimizer = torch.optim.Adam(attached.parameters.values(), foreach=False)
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(model.lm(**inputs).logits, torch.arange(8) % 5)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
        return loss.detach()

    with lora.attached(model, tensors, 16.0) as attached:
        peak, _ = allocated(train)
    counted = training_memory(model, tensors, step)
    assert counted.optimizer_bytes + counted.working_bytes == pytest.approx(peak, rel=0.14)


def test_hand_count_of_what_an_expert_layer_keeps() -> None:
    """OLMoE of hidden 64 and expert hidden 16, 2 x 8 positions of which 14 go to 3 experts each, LoRA on experts only.

    Layer 0 keeps, in float32: the experts' inputs 16 x 64, gates 16 x 3, pre-activations 42 x 32, three low products
    42 x 2; in int64 which pair and which token 2 x 48 (that is how many pairs were sorted), and loads 8 of 9.
    """
    model = tiny("olmoe")
    with model.active_experts(3), lora.attached(model, adapter(model, attention=False), 16.0) as attached:
        layer, *_ = count_saved(model, attached.parameters, 2, 8)
    assert layer == 4 * (16 * 64 + 16 * 3 + 42 * 32 + 3 * 42 * 2) + 8 * (48 + 42 + 9)


def test_nothing_is_kept_below_the_lowest_adapter() -> None:
    model = tiny("olmoe")
    upper = {name: tensor for name, tensor in adapter(model).items() if name.startswith("layers.1.")}
    with lora.attached(model, upper, 16.0) as attached:
        lowest, second, _ = count_saved(model, attached.parameters, 2, 8)
    assert lowest == 0 < second


def allocated(run: Callable[[], torch.Tensor]) -> tuple[int, torch.Tensor]:
    """The most bytes of tensors at one moment that were allocated inside."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        result = run()
    results = profiled.profiler.kineto_results
    events = sorted((event for event in results.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    return max(np.cumsum([event.nbytes() for event in events])), result


@pytest.mark.parametrize(
    ("step", "top_k", "rank"),
    [
        (Step(4, 64, 32), 1, 2),
        (Step(4, 64, 32), 4, 2),
        (Step(4, 64, 32, checkpointing=True), 4, 2),
        (Step(2, 16, 8), 4, 8),
        (Step(2, 16, 8, micro_batches=2), 2, 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", FAMILIES)
def test_training_allocates_what_is_counted(name: str, step: Step, top_k: int, rank: int) -> None:
    """Within 10 %; more for eager attention over so few layers, whose scores' gradients are not counted."""
    compare(tiny(name), step, top_k, rank, 0.13 if name == "gpt_oss" else 0.1)


@pytest.mark.parametrize(
    ("step", "rank"),
    [
        (Step(4, 64, 32), 2),
        (Step(4, 64, 32, checkpointing=True), 2),
        (Step(2, 16, 8), 8),
        (Step(2, 16, 8, micro_batches=2), 8),
    ],
    ids=str,
)
@pytest.mark.parametrize("intermediate", [16, 176])
@pytest.mark.parametrize("name", ["llama", "olmo2"])
def test_training_a_dense_model_allocates_what_is_counted(name: str, intermediate: int, step: Step, rank: int) -> None:
    """Within 11 %, with MLPs of a quarter of the hidden size, and of eleven quarters as in LLaMA."""
    compare(FoundationModel(tiny_family_lm(name, hidden_size=64, intermediate_size=intermediate)), step, 1, rank, 0.11)


def compare(model: FoundationModel, step: Step, top_k: int, rank: int, tolerance: float) -> None:
    tensors = adapter(model, rank)
    batch = step.sequences * step.micro_batches
    config = TrainingConfig(
        batch_size=batch,
        micro_batch_size=step.sequences,
        max_steps=2,
        gradient_checkpointing=step.checkpointing,
    )
    examples = shard(2 * batch, step.length)

    def train() -> torch.Tensor:
        return Trainer(config).train(model, attached, examples, "c", 1, Seeds(0)).counts_LE

    with model.active_experts(top_k):
        with lora.attached(model, tensors, 16.0) as attached:
            peak, counts_LE = allocated(train)
        counted = training_memory(model, tensors, step, counts_LE > 0)
    assert counted.optimizer_bytes + counted.working_bytes == pytest.approx(peak, rel=tolerance)


CHILD = """
import ctypes, gc, json, re, sys
from pathlib import Path
import torch
from transformers import OlmoeConfig, OlmoeForCausalLM
from test_costs_memory import adapter, shard
from emberfed import costs
from emberfed.memory import Step, training_memory
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig

sizes = dict(hidden_size=512, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8, num_experts=64)
model = FoundationModel(OlmoeForCausalLM(OlmoeConfig(**sizes, vocab_size=2048, pad_token_id=0, eos_token_id=1)))
tensors = adapter(model, rank=4)


def train(attached, sequences, length, checkpointing):
    config = TrainingConfig(batch_size=sequences, max_steps=2, gradient_checkpointing=checkpointing)
    return Trainer(config).train(model, attached, shard(2 * sequences, length), "c", 1, Seeds(0)).counts_LE


def resident():
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return 1024 * int(re.search(r"VmRSS:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])


for top_k, checkpointing in ((8, False), (1, False)):
    with model.active_experts(top_k):
        with lora.attached(model, tensors, 16.0) as attached:
            train(attached, 2, 16, checkpointing)
            before = resident()
            with costs.measuring(torch.device("cpu")) as peak:
                counts_LE = train(attached, 4, 256, checkpointing)
        counted = training_memory(model, tensors, Step(4, 256, 128, checkpointing=checkpointing), counts_LE > 0)
    row = {"top_k": top_k, "checkpointing": checkpointing, "measured": peak.bytes - before, "weights": before}
    print(json.dumps({**row, **counted.json()}))
"""
"""Trains a model of 200 MB in a process of its own; one line for each K."""

QUIET = {"MALLOC_MMAP_THRESHOLD_": "65536", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
"""glibc gives freed tensors back, and oneDNN keeps no kernels, which are not the model's."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_grows_by_what_is_counted() -> None:
    """Resident memory from before training to its peak, within 10 %. `-s` shows the figures."""
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True, env=environment)
    for row in map(json.loads, done.stdout.splitlines()):
        counted = row["optimizer_bytes"] + row["working_bytes"]
        print(f"K {row['top_k']} checkpointing {row['checkpointing']}: counted {counted / 1e6:.1f} MB, ", end="")
        print(f"measured {row['measured'] / 1e6:.1f} MB, ratio {counted / row['measured']:.3f}")
        assert counted == pytest.approx(row["measured"], rel=0.1)


def test_parts_of_a_step() -> None:
    model = tiny("olmoe")
    tensors = adapter(model)
    step = Step(4, 64, 32)
    with model.active_experts(2):
        whole = training_memory(model, tensors, step)
        again = training_memory(model, tensors, replace(step, checkpointing=True))
        none = training_memory(model, tensors, step, torch.zeros(2, 8, dtype=torch.bool))
    dense = sum(4 * tensor.numel() for name, tensor in tensors.items() if not lora.is_expert(name))
    assert whole.weight_bytes == sum(4 * weight.numel() for weight in model.lm.parameters()) + 2 * 4 * 8
    assert whole.adapter_bytes == sum(4 * tensor.numel() for tensor in tensors.values())
    assert whole.optimizer_bytes == 2 * whole.adapter_bytes
    assert (none.gradient_bytes, none.optimizer_bytes) == (dense, 2 * dense)
    assert whole.step_bytes == whole.adapter_bytes + whole.optimizer_bytes + whole.working_bytes
    assert whole.json()["total_bytes"] == whole.total_bytes == whole.weight_bytes + whole.step_bytes
    assert again.activation_bytes < whole.activation_bytes
    assert again.working_bytes < whole.working_bytes


@given(sequences=st.integers(2, 64), length=st.integers(8, 512), top_k=st.integers(1, 7))
@settings(max_examples=6, deadline=None)
def test_memory_grows_with_the_batch_and_with_k(sequences: int, length: int, top_k: int) -> None:
    model = tiny("olmoe")
    tensors = adapter(model)

    def working(step: Step, top_k: int) -> int:
        with model.active_experts(top_k):
            return training_memory(model, tensors, step).working_bytes

    step = Step(sequences, length, length)
    base = working(step, top_k)
    assert working(replace(step, sequences=sequences + 1), top_k) > base
    assert working(replace(step, length=length + 1), top_k) > base
    assert working(step, top_k + 1) > base
    assert working(replace(step, head_positions=0), top_k) <= base


def test_expected_share_of_experts_reached() -> None:
    """One token at K = 2 of 8 reaches 1/4 of them, a second one 1/4 of the other 3/4."""
    model = tiny("olmoe")
    tensors = adapter(model, attention=False)
    with model.active_experts(2):
        one = training_memory(model, tensors, Step(1, 1, 1)).gradient_bytes
        two = training_memory(model, tensors, Step(1, 1, 1, micro_batches=2)).gradient_bytes
    whole = costs.tensor_bytes(tensors)
    assert (one, two) == (whole / 4, whole * 7 / 16)


def test_counting_leaves_the_model_as_found() -> None:
    model = tiny("qwen2_moe")
    names = [name for name, _ in model.lm.named_parameters()]
    state = torch.random.get_rng_state()
    training_memory(model, adapter(model, router=True), Step(2, 8, 8))
    assert [name for name, _ in model.lm.named_parameters()] == names
    assert not any(module._forward_hooks for module in model.lm.model.layers)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_quantised_weights_count_as_they_are_stored() -> None:
    lm = tiny_family_lm("olmoe", hidden_size=64)
    full = training_memory(FoundationModel(lm), {}, Step(2, 8, 8)).weight_bytes
    quantise_experts(lm, 8)
    weights = 2 * 8 * 3 * 64 * 16
    groups = 2 * 8 * (32 + 64)  # rows of 64 are one group, rows of 16 too
    assert full - training_memory(FoundationModel(lm), {}, Step(2, 8, 8)).weight_bytes == 3 * weights - 4 * groups


@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_payload_bytes_are_those_sent(name: str) -> None:
    """All but safetensors' header: its length in 8 bytes, and itself."""
    model = tiny(name)
    tensors = adapter(model)
    counts = torch.zeros(len(model.blocks), model.num_experts, dtype=torch.int64)
    for content, counted in (
        (tensors, costs.tensor_bytes(tensors)),
        ({**tensors, ACTIVATION_COUNTS: counts}, costs.upload_bytes(model.shape, tensors)),
    ):
        sent = Payload(1, "c0", Bundle(content, {"top_k": 2})).to_bytes()
        assert len(sent) - 8 - int.from_bytes(sent[:8], "little") == counted


def test_a_layer_s_bytes_add_up_to_whole_numbers() -> None:
    """What six small batches say of a batch of a million positions is still exact to the byte."""
    model = tiny("olmoe")
    with lora.attached(model, adapter(model), 16.0) as attached:
        saved = SavedBytes.count(model, attached.parameters)
    exact = [round(value, 6) for value in saved.coefficients_PC.flatten().tolist()]
    assert exact == [round(value) for value in exact]
    assert memory._terms(3, 5, False) == (1, 5, 25, 3, 15, 75)
    assert memory._terms(3, 5, True) == (1, 3)
