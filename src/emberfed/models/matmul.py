"""The matrix products with frozen weights, in which models spend their time.

torch sends float32 products on CPUs to MKL, which leaves half of some processors' speed unused (AMD's: it takes the
short vector instructions there) and is slow for the few rows one expert gets. oneDNN comes with torch and does neither,
but compiles a kernel for each new shape, a fraction of a millisecond that small products never earn back.
"""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_EXPERT_ELEMENTS = 2**18
"""An expert's matrix of this size is worth kernels for every number of rows it may get."""

_LINEAR_PRODUCTS = 2**25
"""Multiply-adds from which on a linear layer is worth a kernel: its rows are as many in every layer."""


def times(x_NI: torch.Tensor, w_IO: torch.Tensor, bias_O: torch.Tensor | None = None) -> torch.Tensor:
    """Return x w + bias, (N, out): through oneDNN for large float32 matrices on CPUs, else torch's own product.

    Outside autograd only: gradients do not flow through it.
    """
    if w_IO.numel() >= _EXPERT_ELEMENTS and _takes_onednn(x_NI):
        return _onednn(x_NI, w_IO.t(), bias_O)
    return x_NI @ w_IO if bias_O is None else torch.addmm(bias_O, x_NI, w_IO)


def hasten(model: nn.Module) -> None:
    """Let the model's frozen linear layers use oneDNN where it pays; one trained after all computes as before."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_frozen_linear, module)  # type: ignore[method-assign]


def _frozen_linear(linear: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    large = x.numel() * linear.out_features >= _LINEAR_PRODUCTS
    trained = linear.weight.requires_grad or (linear.bias is not None and linear.bias.requires_grad)
    if trained or not (large and _takes_onednn(x)) or torch.is_autocast_enabled("cpu"):
        return F.linear(x, linear.weight, linear.bias)
    apply: Any = _FrozenLinear.apply
    product: torch.Tensor = apply(x, linear.weight, linear.bias)
    return product


@final
class _FrozenLinear(torch.autograd.Function):
    """x W' + bias with a gradient for x only."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(w_OI)
        return _onednn(x.flatten(0, -2), w_OI, bias_O).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (w_OI,) = ctx.saved_tensors
        return _onednn(dy.flatten(0, -2), w_OI.t(), None).view(*dy.shape[:-1], -1), None, None


def _takes_onednn(x: torch.Tensor) -> bool:
    here = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return (
        here and x.device.type == "cpu" and x.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def _onednn(x_NI: torch.Tensor, w_OI: torch.Tensor, bias_O: torch.Tensor | None) -> torch.Tensor:
    # Kernels are kept for every number of rows ever seen, and are large: rows of zeros make the numbers few.
    rows = len(x_NI)
    missing = kernel_rows(rows) - rows
    if missing:
        x_NI = F.pad(x_NI, (0, 0, 0, missing))
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x_NI, w_OI, bias_O, "none", [], "")
    return product[:rows]


def kernel_rows(rows: int) -> int:
    """Return the number of rows to compute for `rows`: 1 to 8, then up to an eighth more, in steps of a power of 2."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step
