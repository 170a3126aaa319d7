"""What training costs, from counted work: FLOPs of the matrix products, and the peak memory of this process.

torch's own FLOP counter misses grouped matrix products and slows small models down; the formulas here take the
positions and assignments that were really computed and are tested against that counter where it can see.

A model is walked once from its input to the head. Each product is told apart by what autograd forms of it: a frozen
matrix costs one more product backward (the gradient of its input) if its input depends on the adapter, a trained one
another for itself. Nothing below the lowest adapted weight is differentiated.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import NamedTuple, final

import psutil
import torch
from torch import Tensor

from emberfed.models.compact import ExpertWork
from emberfed.models.families import GATED_LINEARS
from emberfed.models.foundation_model import ModelShape
from emberfed.models.routed_lora import MATRICES


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Counted work of some forward passes.

    Attributes:
        tokens: Positions that went through the model, padding included since it is computed too.
        routed_tokens: Those of them that went to experts: padding does not.
        attended_pairs: (query, key) pairs per head and layer: sum of batch x length squared.
        top_k: Experts activated per token.
        head_tokens: Positions whose logits were computed; in a classifier examples.
        adapter_rows: Assignments of positions to experts of a sparse adapter, in each layer that has it.
        expert_work: What routed experts and their routers did, by layer with experts, where that was counted: in a
            compact model it follows neither from `routed_tokens` nor from `top_k`. None: it does.
    """

    tokens: int
    routed_tokens: int
    attended_pairs: int
    top_k: int
    head_tokens: int
    adapter_rows: int = 0
    expert_work: tuple[ExpertWork, ...] | None = None

    @staticmethod
    def of_batch(sequences: int, length: int, top_k: int, head_tokens: int, adapter_top_k: int = 0) -> Work:
        """Return the work of one forward pass over sequences of that many tokens each, none of them padding."""
        tokens = sequences * length
        return Work(
            tokens=tokens,
            routed_tokens=tokens,
            attended_pairs=tokens * length,
            top_k=top_k,
            head_tokens=head_tokens,
            adapter_rows=tokens * adapter_top_k,
        )

    def __add__(self, other: Work) -> Work:
        """Add the work of further passes.

        Raises: ValueError if their `top_k` is another, or only one of the two has its experts' work counted.
        """
        if self.top_k != other.top_k:
            raise ValueError(f"work at top_k {self.top_k} and at {other.top_k} cannot be added")
        if (self.expert_work is None) != (other.expert_work is None):
            raise ValueError("work of counted experts and of others cannot be added")
        both = None if self.expert_work is None else zip(self.expert_work, other.expert_work or (), strict=True)
        return Work(
            tokens=self.tokens + other.tokens,
            routed_tokens=self.routed_tokens + other.routed_tokens,
            attended_pairs=self.attended_pairs + other.attended_pairs,
            top_k=self.top_k,
            head_tokens=self.head_tokens + other.head_tokens,
            adapter_rows=self.adapter_rows + other.adapter_rows,
            expert_work=None if both is None else tuple(one + another for one, another in both),
        )

    def of_experts(self, shape: ModelShape, layer: int) -> ExpertWork:
        """Return what the experts and the router of a layer did; without a count every expert counts as tuned."""
        if self.expert_work is not None:
            return self.expert_work[shape.sparse_layers.index(layer)]
        rows = self.routed_tokens * self.top_k
        return ExpertWork(rows, rows, shape.num_experts)


def forward_flops(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of the matrix products of the forward pass (a multiply-add counts 2), adapter included.

    Qwen2-MoE's gate on its shared expert, one column, is left out: 2 * hidden FLOPs a token and layer.
    """
    return sum(product.forward for product in _products(shape, work, adapter))


def backward_flops(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of the matrix products of the backward pass, with a frozen base and a trained adapter.

    What gradient checkpointing computes again is not in it: see `recomputed_flops`.
    """
    return sum(product.backward for product in _products(shape, work, adapter))


def training_flops(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of forward and backward passes."""
    return forward_flops(shape, work, adapter) + backward_flops(shape, work, adapter)


def recomputed_flops(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> int:
    """Return the FLOPs that gradient checkpointing adds: the forward pass of each layer that is differentiated.

    torch stops as soon as it has what backward needs, which saves the last product of an MLP that is computed last.
    """
    layers = _Walk(shape, replace(work, head_tokens=0), adapter)
    live, flops = False, 0
    for layer in range(shape.num_layers):
        products, live = _collect(layers.layer(layer, live))
        flops += sum(product.forward for product in products) if live else 0
    return flops


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of an adapter's tensors in float32, as they are trained and sent."""
    return sum(tensor.numel() for tensor in tensors.values()) * torch.float32.itemsize


def upload_bytes(shape: ModelShape, adapter: Mapping[str, Tensor]) -> int:
    """Return the bytes of an upload's tensors: the adapter, and an int64 activation count for each layer and expert.

    A download is `tensor_bytes`. The header with the names comes to some hundred bytes a tensor.
    """
    return tensor_bytes(adapter) + len(shape.sparse_layers) * shape.num_experts * torch.int64.itemsize


class _Product(NamedTuple):
    """FLOPs of one matrix product, and of those that autograd forms of it."""

    forward: int
    backward: int


_Products = Generator[_Product, None, bool]
"""Products of a part of the model; returns whether its output depends on the adapter."""


def _products(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> Iterator[_Product]:
    walk = _Walk(shape, work, adapter)
    if shape.image is not None:
        yield _Product(2 * work.head_tokens * shape.image.patches * shape.image.patch_values * shape.hidden, 0)
    live = False
    for layer in range(shape.num_layers):
        live = yield from walk.layer(layer, live)
    yield from walk.head(live)


def _collect(part: _Products) -> tuple[list[_Product], bool]:
    """Return a part's products, and whether its output depends on the adapter."""
    products = []
    while True:
        try:
            products.append(next(part))
        except StopIteration as end:
            return products, end.value


@final
@dataclass(frozen=True, slots=True)
class _Walk:
    """The parts of a model in the order they are computed. `live`: a part's input depends on the adapter."""

    shape: ModelShape
    work: Work
    adapter: Mapping[str, Tensor]

    def layer(self, layer: int, live: bool) -> _Products:
        """One decoder layer."""
        attended = yield from self._attention(f"layers.{layer}.self_attn", live)
        before = live or attended
        live = live if self.shape.parallel_residual else before
        beside = yield from self._sparse_adapter(f"layers.{layer}.adapter", live)
        through = yield from self._ffn(layer, live)
        return before or beside or through

    def head(self, live: bool) -> _Products:
        """What makes logits of the last layer's output; a classifier's head is trained if the adapter has it."""
        if not self.shape.head:
            logits = 2 * self.work.head_tokens * self.shape.hidden * self.shape.vocabulary
            yield _Product(logits, logits * live)
            return live
        if self.shape.pooler is not None:
            pooled = 2 * self.work.head_tokens * prod(self.shape.pooler)
            yield _Product(pooled, pooled * live)
        for name, size in self.shape.head.items():
            flops, trained = 2 * self.work.head_tokens * prod(size), name in self.adapter
            yield _Product(flops, flops * (live + trained))
            live = live or trained
        return live

    def _ffn(self, layer: int, live: bool) -> _Products:
        if layer in self.shape.dense_layers:
            return (yield from self._mlp(f"layers.{layer}.mlp", self.shape.mlp, self.shape.dense_intermediate, live))
        work = self.work.of_experts(self.shape, layer)
        gates = yield from self._router(f"layers.{layer}.router.weight", work, live)
        through = yield from self._experts(f"layers.{layer}.experts", work, live, gates)
        shared = False
        if self.shape.shared_intermediate:
            path = f"layers.{layer}.shared_experts"
            shared = yield from self._mlp(path, GATED_LINEARS, self.shape.shared_intermediate, live)
        return live or through or shared

    def _sparse_adapter(self, path: str, live: bool) -> _Products:
        """Experts beside the FFN, trained in full, and the gate that chooses among them where there are several."""
        down = self.adapter.get(f"{path}.experts.down_proj")
        if down is None:
            return False
        gate = self.adapter.get(f"{path}.router.weight")
        if gate is not None:
            chosen = 2 * self.work.tokens * gate.numel()
            yield _Product(chosen, chosen * (1 + live))
        product = 2 * self.work.adapter_rows * down[0].numel()
        yield _Product(product, product * (1 + live))
        yield _Product(product, product * 2)
        return True

    def _linear(self, path: str, weights: int, live: bool) -> _Products:
        frozen = 2 * self.work.tokens * weights
        yield _Product(frozen, frozen * live)
        if f"{path}.lora_A" not in self.adapter:
            return live
        low, high = (2 * self.work.tokens * self.adapter[f"{path}.lora_{side}"].numel() for side in "AB")
        yield _Product(low, low * (1 + live))
        yield _Product(high, high * 2)
        return True

    def _attention(self, path: str, live: bool) -> _Products:
        shape, pairs = self.shape, self.work.attended_pairs
        made: dict[tuple[str, ...], bool] = {}  # one chain of linears may make two of the three, or all of them
        for chain in (shape.query, shape.key, shape.value):
            if chain not in made:
                through = live
                for name in chain:
                    through = yield from self._linear(f"{path}.{name}", prod(shape.attention[name]), through)
                made[chain] = through
        query, key, value = made[shape.query], made[shape.key], made[shape.value]
        scores = query or key
        score_flops, mix_flops = (2 * pairs * shape.heads * size for size in (shape.qk_head_dim, shape.v_head_dim))
        yield _Product(score_flops, score_flops * (query + key))
        yield _Product(mix_flops, mix_flops * (scores + value))
        return (yield from self._linear(f"{path}.{shape.output}", prod(shape.attention[shape.output]), scores or value))

    def _router(self, name: str, work: ExpertWork, live: bool) -> _Products:
        flops, trained = 2 * self.work.tokens * self.shape.hidden * work.choices, name in self.adapter
        yield _Product(flops, flops * (live + trained))
        return live or trained

    def _experts(self, path: str, work: ExpertWork, live: bool, gates: bool) -> _Products:
        """Routed experts, which are one autograd node: it always forms the gates' gradient and what leads to it."""
        weights = self.shape.hidden * self.shape.expert_intermediate
        loras = [matrix for matrix in MATRICES if f"{path}.{matrix}.lora_A" in self.adapter]
        full = [matrix for matrix in MATRICES if f"{path}.{matrix}.weight" in self.adapter]
        differentiated = bool(live or gates or loras or full)
        flops = 2 * work.rows * weights
        yield _Product(2 * flops, 2 * flops * live)
        yield _Product(flops, flops * differentiated)
        for matrix in loras:
            low, high = (2 * work.tuned_rows * self.adapter[f"{path}.{matrix}.lora_{side}"][0].numel() for side in "AB")
            yield _Product(low, low * (1 + (live or matrix == "down_proj")))
            yield _Product(high, high * 2)
        yield _Product(0, 2 * work.tuned_rows * weights * len(full))
        return differentiated

    def _mlp(self, path: str, linears: Sequence[str], intermediate: int, live: bool) -> _Products:
        weights = self.shape.hidden * intermediate
        *inner, outer = linears
        reached = live
        for name in inner:
            reached = (yield from self._linear(f"{path}.{name}", weights, live)) or reached
        return (yield from self._linear(f"{path}.{outer}", weights, reached))


@final
class PeakMemory:
    """The highest resident (CPU) or allocated (CUDA) memory since `measuring` was entered, in bytes."""

    def __init__(self, device: torch.device) -> None:
        """Measure the memory of this device."""
        self._device = device
        self.bytes = 0

    def read(self) -> None:
        """Take the reading now."""
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device)
            return
        status = Path("/proc/self/status")
        if status.exists():
            peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
            if peak:
                self.bytes = int(peak.group(1)) * 1024
                return
        self.bytes = psutil.Process().memory_info().rss


@contextmanager
def measuring(device: torch.device) -> Iterator[PeakMemory]:
    """Measure peak memory inside the block. Where the system cannot forget older peaks, the figure includes them."""
    peak = PeakMemory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: reset VmHWM
    yield peak
    peak.read()
