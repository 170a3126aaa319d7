"""A second model whose experts are in 8 or 4 bits, beside the first: to look at what experts do, without training them.

It shares the first one's parameters but the experts, and none of its modules: both can run at once, in two threads, and
an adapter attached to one is not on the other.

Shapes: E experts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import final

import torch
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.expert_values import ExpertMatrices
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.quantised import Bits, QuantisedWeight
from emberfed.models.stacked import EXPERT_WEIGHTS, StackedWeight, replace


def low_bit_copy(model: FoundationModel, bits: Bits) -> FoundationModel:
    """Return a second model of the same weights, its experts quantised; it begins at the native K.

    Experts are read one at a time, wherever they are held, so that no stack is ever restored. Beside the experts, only
    buffers are copied, which are small and some of which a forward pass writes (long RoPE's). Experts that are
    quantised already are shared, whatever their bits: another copy of them would take memory and lose accuracy.

    Args:
        model: The first model, with nothing attached; not changed. It must not be changed afterwards either, but by
            what is attached to it.
        bits: 8 or 4.

    Raises: ModelError if the model is dense, something is attached to it, or its experts cannot be quantised.
    """
    mixture = model.family.mixture
    if mixture is None:
        raise ModelError(f"{model.family.model_type} models are dense: there are no experts to hold in {bits} bits")
    config = copy.deepcopy(model.lm.config)
    setattr(config, mixture.top_k, model.native_top_k)
    with torch.device("meta"):
        twin = type(model.lm)(config)
    experts = {block.experts for block in model.blocks}
    for path, module in list(twin.named_modules()):
        source = _source(model.lm, path, module)
        for name in module._parameters:
            if source in experts and name in EXPERT_WEIGHTS:
                continue
            module._parameters[name] = source._parameters[name]
        for name, buffer in source._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
        if source in experts:
            for name in EXPERT_WEIGHTS:
                replace(module, name, _quantised(getattr(source, name), bits, f"weight '{path}.{name}'"))
    return FoundationModel(twin)


def _source(lm: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return the module that `module` is made after. Raises: ModelError if the model has another one there."""
    try:
        source = lm.get_submodule(path)
    except AttributeError:
        source = lm
    extra = {name for name, _ in source.named_children()} - {name for name, _ in module.named_children()}
    if type(source) is not type(module) or extra - set(EXPERT_WEIGHTS):
        raise ModelError(
            f"a copy in fewer bits is of a model as it was loaded, but something is attached to {path or 'this one'}; "
            f"take it off first"
        )
    return source


def _quantised(weight: torch.Tensor | StackedWeight, bits: Bits, name: str) -> QuantisedWeight:
    """Return a stack in fewer bits, read expert by expert where it is kept in another way than as numbers in memory."""
    if isinstance(weight, QuantisedWeight):
        return QuantisedWeight(weight.codes, weight.scale, weight.minimum, weight.bits)
    if isinstance(weight, torch.Tensor):
        return QuantisedWeight.quantise(weight, bits, name=name)
    whole: QuantisedWeight | None = None
    for index in range(weight.shape[0]):
        one = QuantisedWeight.quantise(weight.expert(index, torch.float32).unsqueeze(0), bits, name=name)
        whole = _room(one, weight.shape[0]) if whole is None else whole
        whole.codes[index], whole.scale[index], whole.minimum[index] = one.codes[0], one.scale[0], one.minimum[0]
    if whole is None:
        raise ModelError(f"{name} holds no experts; the model is damaged")
    return whole


def _room(one: QuantisedWeight, experts: int) -> QuantisedWeight:
    """Return an unfilled stack of as many experts as `one` is."""
    codes, scale, minimum = (
        stack.new_empty(experts, *stack.shape[1:]) for stack in (one.codes, one.scale, one.minimum)
    )
    return QuantisedWeight(codes, scale, minimum, one.bits)


@contextmanager
def holding(model: FoundationModel, row: int, experts: Mapping[int, ExpertMatrices]) -> Iterator[None]:
    """Let a copy hold other values for some experts of one layer inside the context; then it is exactly as found.

    The codes it shares, maybe with a model in use elsewhere, are not written. Biases stay the base's:
    nothing tunes them.

    Args:
        model: What `low_bit_copy` gave.
        row: Index of the layer in `model.blocks`.
        experts: By expert; quantised as the layer is.

    Raises: ModelError if the layer is not quantised or holds other values already, or an expert or shape is not the
    layer's.
    """
    block = model.blocks[row]
    transposed = bool(block.experts.is_transposed)
    beyond = [expert for expert in experts if not 0 <= expert < block.num_experts]
    if beyond:
        raise ModelError(f"layer {block.layer} has experts 0 to {block.num_experts - 1}, but values for {beyond} came")
    stored = {
        "gate_up_proj": {expert: matrices.gate_up_D2F for expert, matrices in experts.items()},
        "down_proj": {expert: matrices.down_FD for expert, matrices in experts.items()},
    }
    with ExitStack() as stack:
        for name, values in stored.items():
            weight = getattr(block.experts, name)
            where = f"weight {name!r} of layer {block.layer}"
            if not isinstance(weight, QuantisedWeight):
                raise ModelError(f"{where} is not quantised, or holds other values already; give a low_bit_copy")
            held = {
                expert: _like(weight, value if transposed else value.t(), where) for expert, value in values.items()
            }
            stack.enter_context(_instead(block.experts, name, HeldWeight(weight, held)))
        yield


def _like(weight: QuantisedWeight, matrix: torch.Tensor, where: str) -> QuantisedWeight:
    if matrix.shape != weight.shape[1:]:
        raise ModelError(f"{where} is of experts {tuple(weight.shape[1:])}, but a value of {tuple(matrix.shape)} came")
    return QuantisedWeight.quantise(matrix.unsqueeze(0), weight.bits, weight.group_size, where)


@contextmanager
def _instead(module: nn.Module, name: str, weight: nn.Module) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, weight)
    try:
        yield
    finally:
        setattr(module, name, before)


@final
class HeldWeight(StackedWeight):
    """A quantised stack of which some experts have other values, which are held beside it."""

    def __init__(self, base: QuantisedWeight, held: Mapping[int, QuantisedWeight]) -> None:
        """Hold stacks of one expert each, by expert."""
        super().__init__()
        # A tuple, which torch does not look into: the base would else be found once more in the model, as its child.
        self._stacks = (base, dict(held))

    @property
    def shape(self) -> torch.Size:
        """(E, rows, columns)."""
        return self._stacks[0].shape

    @property
    def dtype(self) -> None:
        """None: weights are codes."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self._stacks[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all codes, scales and minima."""
        base, held = self._stacks
        return base.nbytes + sum(weight.nbytes for weight in held.values())

    @property
    def kept_as(self) -> str:
        """Bits per code."""
        return self._stacks[0].kept_as

    def expert(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's matrix restored, (rows, columns): a fresh tensor, computed in float32."""
        base, held = self._stacks
        return held[index].expert(0, dtype) if index in held else base.expert(index, dtype)
