"""Frozen expert weights in 8 or 4 bits: a client that activates one expert need not hold all of them in 16.

Every row is cut into groups of neighbouring weights; a group keeps a code per weight and, as float16, a minimum and a
scale: w = minimum + code * scale. With groups of 64 that is 8.5 or 4.5 bits a weight, scales included. Experts are
restored one at a time, for the matrix product that needs them.

Why not a library: transformers keeps a layer's experts in one parameter of three dimensions. bitsandbytes, through
transformers, replaces `nn.Linear` only and leaves such a parameter in 16 bit without a word; its own
`replace_parameter_4bit` (0.50) restores all experts at every access, however few are active. torchao (0.18) holds a
stack in 8 bits, but its 4-bit formats need further packages or a GPU. One format of ours serves both widths everywhere.

Shapes: E experts, each (rows, columns) as transformers stores them; G groups per row.
"""

from __future__ import annotations

import itertools
from typing import Final, Literal, final

import torch
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.stacked import StackedWeight, replace, stacked_weights

Bits = Literal[4, 8]

_LARGEST_GROUP: Final = 64
_SMALLEST_GROUP: Final = 8
_NIBBLE: Final = 15
_BLOCK_ELEMENTS: Final = 2**17
"""Weights that are quantised at a time: few enough to stay in a processor's cache, and in memory afterwards."""


@final
class QuantisedWeight(StackedWeight):
    """A stack of expert matrices in fewer bits, which stands where the stacked parameter stood.

    It holds buffers and no parameters: it moves with the model and is saved with it, but nothing can train it.

    Attributes:
        bits: Bits per code.
        codes: uint8, (E, rows, columns); with 4 bits (E, rows, columns / 2), the first half of each row in the low
            four bits and the second half in the high ones, so that halves are restored without interleaving.
        scale: float16, (E, rows, G): the step from one code to the next.
        minimum: float16, (E, rows, G): what code 0 means.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    minimum: torch.Tensor

    def __init__(self, codes: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor, bits: Bits) -> None:
        """Hold what `quantise` made; the shapes say the rest."""
        super().__init__()
        self.bits = bits
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.register_buffer("minimum", minimum)

    @staticmethod
    def quantise(
        tensor: torch.Tensor, bits: Bits, group_size: int | None = None, name: str = "an expert weight"
    ) -> QuantisedWeight:
        """Quantise some rows at a time, so that no second copy of the stack in float32 ever exists.

        A restored weight is off by at most half a step of its group. Groups whose values are all the same are exact
        where float16 is (so for bfloat16 weights of at least 6e-5), and groups of zeros always.

        Args:
            tensor: (E, rows, columns), of any floating-point type; not changed.
            bits: 8 or 4.
            group_size: Weights per group, a divisor of the columns; None is `default_group_size`.
            name: What errors call the tensor.

        Raises: ModelError if the columns cannot be grouped so, or if a value is not finite, or so large that a
            group's minimum or scale is beyond float16's 65504.
        """
        experts, rows, columns = tensor.shape
        size = default_group_size(columns, name) if group_size is None else group_size
        if size < 1 or columns % size or columns % 2:
            raise ModelError(f"{name} has {columns} columns, which groups of {size} do not divide; choose a divisor")
        codes = torch.empty(experts, rows, columns * bits // 8, dtype=torch.uint8, device=tensor.device)
        scale = torch.empty(experts, rows, columns // size, dtype=torch.float16, device=tensor.device)
        minimum = torch.empty_like(scale)
        step = max(1, _BLOCK_ELEMENTS // columns)
        for index, start in itertools.product(range(experts), range(0, rows, step)):
            at = (index, slice(start, start + step))
            codes[at], scale[at], minimum[at] = _encode(tensor[at].detach().float(), bits, size)
        # One value that is not finite makes its group's minimum or scale so too.
        if not torch.isfinite(scale).all() or not torch.isfinite(minimum).all():
            raise ModelError(
                f"{name} holds values that are not finite, or too large for float16; the checkpoint is damaged, or "
                f"cannot be quantised"
            )
        return QuantisedWeight(codes, scale, minimum, bits)

    @property
    def shape(self) -> torch.Size:
        """(E, rows, columns), as of the parameter it stands for."""
        experts, rows, stored = self.codes.shape
        return torch.Size((experts, rows, stored * 8 // self.bits))

    @property
    def dtype(self) -> None:
        """None: weights are codes."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the codes are, and experts restored."""
        return self.codes.device

    @property
    def kept_as(self) -> str:
        """Bits per code."""
        return f"{self.bits} bit"

    @property
    def group_size(self) -> int:
        """Weights that share a scale and a minimum."""
        return self.shape[2] // self.scale.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and minima."""
        return self.codes.nbytes + self.scale.nbytes + self.minimum.nbytes

    def expert(self, index: int, dtype: torch.dtype) -> torch.Tensor:
        """Return one expert's matrix restored, (rows, columns): a fresh tensor, computed in float32."""
        codes, scale, minimum = self.codes[index], self.scale[index], self.minimum[index]
        matrix = torch.empty(self.shape[1:], dtype=torch.float32, device=codes.device)
        if self.bits == 4:
            half = codes.shape[1]
            matrix[:, :half] = codes & _NIBBLE
            matrix[:, half:] = codes >> 4
        else:
            matrix.copy_(codes)
        groups = matrix.view(len(matrix), scale.shape[1], -1)
        groups.mul_(scale.float().unsqueeze(-1)).add_(minimum.float().unsqueeze(-1))
        return matrix.to(dtype)

    def extra_repr(self) -> str:
        """Say what is held, for `print(model)`."""
        return f"{tuple(self.shape)}, bits={self.bits}, group_size={self.group_size}"


def default_group_size(columns: int, name: str = "an expert weight") -> int:
    """Return the largest divisor of `columns` that is at most 64; every known model has 64 itself, or 32.

    Raises: ModelError, with `name`, if the columns are odd or have no divisor from 8 to 64.
    """
    fitting = [size for size in range(_SMALLEST_GROUP, _LARGEST_GROUP + 1) if columns % size == 0 and columns % 2 == 0]
    if not fitting:
        raise ModelError(
            f"{name} has {columns} columns: an odd number, or one without a divisor from {_SMALLEST_GROUP} to "
            f"{_LARGEST_GROUP}; it cannot be quantised, leave model.expert_bits out"
        )
    return fitting[-1]


def quantise_experts(lm: nn.Module, bits: Bits) -> None:
    """Replace a loaded model's expert weights by quantised ones, in place, each old one freed before the next is read.

    Biases stay. `loading.load` with `expert_bits` does the same while it reads, and never holds all of them in full.

    Raises: ModelError naming the weight that cannot be quantised, or is replaced already; those before it are by then.
    """
    for name, module, attribute in stacked_weights(lm):
        weight = getattr(module, attribute)
        if isinstance(weight, StackedWeight):
            raise ModelError(f"weight {name!r} is kept as {weight.kept_as} already; load the model again")
        replace(module, attribute, QuantisedWeight.quantise(weight, bits, name=f"weight {name!r}"))


def _encode(matrix: torch.Tensor, bits: Bits, group_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes (rows, columns * bits / 8), scale (rows, G) and minimum (rows, G) of a float32 matrix."""
    highest_code = 2**bits - 1
    groups = matrix.reshape(len(matrix), -1, group_size)
    low, high = groups.aminmax(dim=-1)
    minimum = _float16_below(low)
    span = high - minimum.float()
    scale = (span / highest_code).half()
    # The nearest float16 will do, except among subnormals: there it can be so small that the maximum has no code.
    scale = torch.where(scale.float() * (highest_code + 0.5) < span, _next(scale, torch.inf), scale)
    step = torch.where(scale == 0, 1, scale.float()).unsqueeze(-1)
    codes = ((groups - minimum.float().unsqueeze(-1)) / step).round_().clamp_(0, highest_code).to(torch.uint8)
    codes = codes.reshape(matrix.shape)
    if bits == 4:
        first, second = codes.chunk(2, dim=1)
        codes = first | (second << 4)
    return codes, scale, minimum


def _float16_below(values: torch.Tensor) -> torch.Tensor:
    """Return the largest float16 that is not above each value, so that code 0 is below every weight."""
    nearest = values.half()
    return torch.where(nearest.float() > values, _next(nearest, -torch.inf), nearest)


def _next(values: torch.Tensor, towards: float) -> torch.Tensor:
    return torch.nextafter(values, torch.full_like(values, towards))
