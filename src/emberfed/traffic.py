"""Bytes that local training moves through memory: which weights each pass really reads, and what the optimiser touches.

    frozen weights    of every layer (1 + d (1 + c)) times a pass: forward, backward if something in the layer or below
                      it is trained (d), and forward again under gradient checkpointing (c); of its experts only those
                      that got a token, each once however many tokens it got
    frozen head       twice a pass
    trained weights   per step, elements with a gradient: read forward and backward in each pass (2), written and read
                      as a gradient (2), and read and written by Adam with both moments (3 + 3), 4 bytes each

Left out: activations, whose products compute time covers; rows of the embedding; and for weights in fewer bits the
restored copy of an expert, which a cache may or may not hold. An expert on disk counts the bytes it has in memory.

Shapes: T tokens, K slots per token, L layers with experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.head import is_head

_FLOAT32_BYTES: Final = 4
_PER_PASS: Final = 2
_PER_STEP: Final = 8


@final
class WeightReads:
    """Counts the passes of a model, and in each how many experts of each layer get a token."""

    def __init__(self, model: FoundationModel) -> None:
        """Start at zero; sums are kept on the model's device, so that counting never waits for it."""
        self._model = model
        self._passes = 0
        self._read_L = torch.zeros(len(model.blocks), dtype=torch.int64, device=model.device)
        self._seen: set[int] = set()

    def frozen_bytes(self, trained: Mapping[str, Tensor], recomputed: bool) -> int:
        """Return the bytes of frozen weights that the passes so far read, each followed by its backward pass.

        Args:
            trained: What is trained, by canonical name.
            recomputed: Whether layers are computed again in backward.
        """
        layers = [lora.layer_of(name) for name in trained if not is_head(name)]
        lowest = min(layers, default=len(self._model.layers))
        sparse = {block.layer: block.experts for block in self._model.blocks}
        reached = dict(zip(sparse, self._experts_bytes(), strict=True))
        total = 2 * self._passes * self._head_bytes()
        for layer, module in enumerate(self._model.layers):
            reads = 1 + (layer >= lowest) * (1 + recomputed)
            beside = _bytes(_frozen(module)) - (_bytes(_frozen(sparse[layer])) if layer in sparse else 0)
            total += reads * (self._passes * beside + reached.get(layer, 0))
        return total

    def begin(self, *_: Any) -> None:
        """Begin a pass of the model."""
        self._passes += 1
        self._seen.clear()

    def add(self, row: int, experts: nn.Module, index_TK: Tensor) -> None:
        """Count the experts of a layer that get a token, once per pass: checkpointing runs layers again in backward."""
        if row in self._seen:
            return
        self._seen.add(row)
        slots = _slots(experts)
        reached = torch.zeros(slots + 1, dtype=torch.bool, device=index_TK.device)  # the last is for none
        reached[index_TK.reshape(-1)] = True
        self._read_L[row] += reached[:slots].sum()

    def _experts_bytes(self) -> list[int]:
        """Return, for each layer with experts, the bytes of those that the passes read."""
        read = zip(self._read_L.tolist(), (block.experts for block in self._model.blocks), strict=True)
        return [count * (_bytes(_frozen(experts)) // _slots(experts)) for count, experts in read]

    def _head_bytes(self) -> int:
        head = self._model.lm.get_output_embeddings() if self._model.head is None else self._model.head
        return _bytes(_frozen(head))


@contextmanager
def counting_reads(model: FoundationModel) -> Iterator[WeightReads]:
    """Count what the model reads inside the context, as it stands: its present experts, wherever tokens go to them."""
    reads = WeightReads(model)

    def add(row: int, experts: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        reads.add(row, experts, args[1] if len(args) > 1 else kwargs["top_k_index"])

    with ExitStack() as stack:
        stack.callback(model.lm.base_model.register_forward_pre_hook(reads.begin).remove)
        for row, block in enumerate(model.blocks):
            hook = block.experts.register_forward_pre_hook(partial(add, row), with_kwargs=True)
            stack.callback(hook.remove)
        yield reads


def trained_bytes(elements: int, passes: int) -> int:
    """Return the bytes that a step moves for its trained weights, `elements` of which have a gradient."""
    return elements * _FLOAT32_BYTES * (_PER_PASS * passes + _PER_STEP)


def _frozen(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of a module that nothing trains, each once; a quantised stack's are buffers."""
    yield from (tensor for tensor in module.parameters() if not tensor.requires_grad)
    yield from module.buffers()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _slots(experts: Any) -> int:
    """Return how many experts a layer holds; their indices run below it."""
    slots: int = experts.num_experts
    return slots
