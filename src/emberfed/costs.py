"""What training costs, from counted work: FLOPs of the matrix products, and the peak memory of this process.

torch's own FLOP counter misses grouped matrix products and slows small models down; the formulas here take the
positions and assignments that were really computed and are tested against that counter where it can see.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import final

import psutil
import torch
from torch import Tensor

from emberfed.models.lora import is_expert
from emberfed.models.sparse_model import ModelShape


@final
@dataclass(frozen=True, slots=True)
class Work:
    """Counted work of some forward passes, padding included since it is computed too.

    Attributes:
        tokens: Positions that went through the model.
        attended_pairs: (query, key) pairs per head and layer: sum of batch x length squared.
        top_k: Experts activated per token.
        head_tokens: Positions whose logits were computed.
    """

    tokens: int
    attended_pairs: int
    top_k: int
    head_tokens: int

    def __add__(self, other: Work) -> Work:
        """Add the work of further passes with the same `top_k`."""
        return Work(
            self.tokens + other.tokens,
            self.attended_pairs + other.attended_pairs,
            self.top_k,
            self.head_tokens + other.head_tokens,
        )


def forward_flops(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of the matrix products of the forward pass (a multiply-add counts 2), adapter included."""
    qkv, out, router, expert = _weights_per_layer(shape)
    attention = 4 * work.attended_pairs * shape.heads * shape.head_dim
    per_layer = 2 * work.tokens * (qkv + out + router + work.top_k * expert) + attention
    head = 2 * work.head_tokens * shape.hidden * shape.vocabulary
    return shape.num_layers * per_layer + head + _adapter_flops(adapter, work)


def training_flops(shape: ModelShape, work: Work, adapter: Mapping[str, Tensor]) -> int:
    """Return the FLOPs of forward and backward passes with a frozen base and a trained adapter.

    Backward, a frozen matrix costs one product (the gradient of its input), a trained one two, attention's two
    products four. Nothing below the lowest adapter is differentiated: layer 0's inputs need no gradient.
    """
    qkv, out, router, expert = _weights_per_layer(shape)
    tokens, layers = work.tokens, shape.num_layers
    attention = 8 * work.attended_pairs * shape.heads * shape.head_dim
    head = 2 * work.head_tokens * shape.hidden * shape.vocabulary
    full = 2 * tokens * (qkv + out + router + work.top_k * expert) + attention
    if any(".self_attn." in name for name in adapter):
        unneeded = 2 * tokens * qkv
    else:
        gate_up = 2 * shape.hidden * shape.expert_intermediate
        unneeded = 2 * tokens * (qkv + out + router + work.top_k * gate_up) + attention
    lora = 2 * _adapter_flops(adapter, work) - _unneeded_adapter_flops(adapter, work)
    routers = sum(2 * tokens * tensor.numel() for name, tensor in adapter.items() if name.endswith(".router.weight"))
    return forward_flops(shape, work, adapter) + layers * full - unneeded + head + lora + routers


def _weights_per_layer(shape: ModelShape) -> tuple[int, int, int, int]:
    """Return the number of weights of q+k+v, of o, of the router, and of one expert."""
    sizes = {name: rows * columns for name, (rows, columns) in shape.attention.items()}
    out = sizes.pop("o_proj")
    expert = 3 * shape.hidden * shape.expert_intermediate
    return sum(sizes.values()), out, shape.hidden * shape.num_experts, expert


def _adapter_flops(adapter: Mapping[str, Tensor], work: Work) -> int:
    return sum(_tensor_flops(name, tensor, work) for name, tensor in adapter.items() if "lora_" in name)


def _unneeded_adapter_flops(adapter: Mapping[str, Tensor], work: Work) -> int:
    """FLOPs of input gradients that layer 0 does not form: of the first A matrices that see the embedding."""
    attention = any(".self_attn." in name for name in adapter)
    first = r"layers\.0\.self_attn\.[qkv]_proj\.lora_A" if attention else r"layers\.0\.experts\.(gate|up)_proj\.lora_A"
    return sum(_tensor_flops(name, tensor, work) for name, tensor in adapter.items() if re.fullmatch(first, name))


def _tensor_flops(name: str, tensor: Tensor, work: Work) -> int:
    if is_expert(name):
        return 2 * work.tokens * work.top_k * (tensor.numel() // tensor.shape[0])
    return 2 * work.tokens * tensor.numel()


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
