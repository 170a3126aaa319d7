"""Products through oneDNN are products, and gradients through frozen layers are gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from emberfed.models.matmul import hasten, kernel_rows, times

LARGE = (600, 512)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("shape", [LARGE, (12, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_times_is_the_product_either_way_round(rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, w, bias = random(rows, shape[0]).to(dtype), random(*shape).to(dtype), random(shape[1]).to(dtype)
    wanted = x.double() @ w.double()
    rtol, atol = (0.02, 1.0) if dtype == torch.bfloat16 else (1e-4, 1e-3)
    for matrix in (w, w.t().contiguous().t()):
        torch.testing.assert_close(times(x, matrix).double(), wanted, rtol=rtol, atol=atol)
        torch.testing.assert_close(times(x, matrix, bias).double(), wanted + bias.double(), rtol=rtol, atol=atol)
    assert times(x, w).dtype == dtype


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4, 150, 512), (2, 3, 512), (600, 512)])
def test_hastened_layers_compute_the_same(shape: tuple[int, ...], bias: bool) -> None:
    model = nn.Sequential(nn.Linear(512, 640, bias=bias))
    for parameter in model.parameters():
        parameter.data = random(*parameter.shape)
    model.requires_grad_(False)
    x = random(*shape).requires_grad_()
    wanted = F.linear(x, *model.parameters())
    (wanted_gradient,) = torch.autograd.grad(wanted.square().sum(), x)
    hasten(model)
    found = model(x)
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1.0)


def test_small_layers_keep_their_bits() -> None:
    model = nn.Sequential(nn.Linear(16, 8)).requires_grad_(False)
    x = random(5, 16)
    wanted = model(x)
    hasten(model)
    assert torch.equal(model(x), wanted)


def test_autocast_and_other_kinds_of_layers_are_left_alone() -> None:
    class Own(nn.Linear):
        """A layer that may do more than a product."""

    frozen, own = nn.Linear(512, 640), Own(512, 640)
    hasten(nn.Sequential(frozen, own))
    x = random(600, 512)
    with torch.autocast("cpu", torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    own(x).sum().backward()
    assert own.weight.grad is not None


def test_a_layer_that_is_trained_after_all_gets_its_gradients() -> None:
    linear = nn.Linear(512, 640)
    hasten(nn.Sequential(linear))
    linear(random(600, 512)).sum().backward()
    assert linear.weight.grad is not None
    assert linear.bias.grad is not None
    assert linear.weight.grad.any()


def test_few_numbers_of_rows_are_really_computed() -> None:
    assert [kernel_rows(rows) for rows in (1, 8, 15, 17, 33, 64, 65, 1000)] == [1, 8, 15, 18, 36, 64, 72, 1024]
    assert all(rows <= kernel_rows(rows) <= rows * 9 / 8 for rows in range(1, 5000))
    assert len({kernel_rows(rows) for rows in range(1, 4097)}) == 80
