"""What an optimiser, and penalties, see of stacked gradients: rows of experts with real tokens, in shared memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from emberfed.models.groups import ExpertViews, Gradient, TrainableGroups, clip_gradients
from emberfed.models.low_rank import sparse_over_experts

EXPERTS = 6
NAME = "layers.1.experts.up_proj.lora_A"


def touched(*experts: int) -> torch.Tensor:
    """Of two layers; the second is the tensor's."""
    mask = torch.zeros(2, EXPERTS, dtype=torch.bool)
    mask[1, list(experts)] = True
    return mask


def groups(*used: int) -> TrainableGroups:
    """A dense tensor and a stacked one whose gradient has rows for the experts `used`."""
    draw = torch.Generator().manual_seed(3)
    dense = nn.Parameter(torch.randn(4, 2, generator=draw))
    dense.grad = torch.randn(4, 2, generator=draw)
    stacked = nn.Parameter(torch.randn(EXPERTS, 2, 3, generator=draw))
    values = torch.randn(len(used), 2, 3, generator=draw)
    stacked.grad = sparse_over_experts(values, torch.tensor(used), EXPERTS)
    return TrainableGroups({"layers.1.router.weight": dense}, (ExpertViews.of(NAME, stacked, 1),))


def test_gradients_are_named_and_know_their_experts_and_values() -> None:
    trained = groups(1, 2, 5)
    dense, stacked = trained.take_gradients(touched(0, 1, 2, 5))
    parameter = trained.experts[0].stacked
    assert (dense.name, dense.experts_U) == ("layers.1.router.weight", None)
    assert dense.rows_of(dense.parameter) is dense.parameter
    assert stacked.name == NAME
    assert stacked.experts_U is not None
    assert stacked.experts_U.tolist() == [1, 2, 5]
    assert torch.equal(stacked.rows_of(stacked.parameter), parameter.detach()[[1, 2, 5]])
    with torch.no_grad():
        parameter[2] += 1
    assert torch.equal(stacked.rows_of(stacked.parameter), parameter.detach()[[1, 2, 5]]), "present values"


@pytest.mark.parametrize("real", [(1, 2, 5), (2, 5), ()])
def test_what_is_added_to_values_is_what_the_optimiser_follows(real: tuple[int, ...]) -> None:
    """Also where a row had to be left out: an expert whose only tokens were padding has no gradient at all."""
    trained = groups(1, 2, 5)
    parameter = trained.experts[0].stacked
    before = parameter.detach().clone()
    assert parameter.grad is not None
    rows = parameter.grad.to_dense().clone()
    gradients = trained.take_gradients(touched(*real))
    for gradient in gradients:
        gradient.values.add_(10.0)
    for expert, view in enumerate(trained.experts[0].views):
        if expert in real:
            assert view.grad is not None
            assert torch.equal(view.grad, rows[expert] + 10)
        else:
            assert view.grad is None
    torch.optim.SGD(trained.parameters(), lr=1.0).step()
    for expert in range(EXPERTS):
        step = rows[expert] + 10 if expert in real else torch.zeros(2, 3)
        assert torch.equal(parameter.detach()[expert], before[expert] - step)


def test_accumulated_passes_are_summed_once() -> None:
    trained = groups(1, 4)
    stacked = trained.experts[0].stacked
    assert stacked.grad is not None
    first = stacked.grad.to_dense().clone()
    second = torch.ones(2, 2, 3)
    stacked.grad = stacked.grad + sparse_over_experts(second, torch.tensor([3, 4]), EXPERTS)
    gradient = trained.take_gradients(touched(1, 3, 4))[1]
    assert gradient.experts_U is not None
    assert gradient.experts_U.tolist() == [1, 3, 4]
    torch.testing.assert_close(gradient.values, torch.stack([first[1], torch.ones(2, 3), first[4] + 1]))


@pytest.mark.parametrize("limit", [0.5, 1e6])
def test_clipping_is_torch_s_over_all_that_the_optimiser_sees(limit: float) -> None:
    ours, torchs = groups(0, 3), groups(0, 3)
    gradients = ours.take_gradients(touched(0, 3))
    torchs.take_gradients(touched(0, 3))
    norm = clip_gradients(gradients, limit)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(torchs.parameters(), limit))
    assert norm > 0.5
    for one, other in zip(ours.parameters(), torchs.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        if one.grad is not None and other.grad is not None:
            torch.testing.assert_close(one.grad, other.grad)


def test_rows_are_for_tensors_of_any_width() -> None:
    gradient = Gradient(NAME, torch.zeros(EXPERTS, 2, 3), torch.tensor([0, 4]), torch.zeros(2, 2, 3))
    wide = torch.arange(EXPERTS * 5.0).view(EXPERTS, 5)
    assert torch.equal(gradient.rows_of(wide), wide[[0, 4]])


def test_a_stack_of_some_experts_finds_them_by_their_ids() -> None:
    """Experts 1, 3 and 4 of six are in the stack; 1 and 4 have a gradient, and of those only 4 got a real token."""
    stacked = nn.Parameter(torch.zeros(3, 2))
    stacked.grad = sparse_over_experts(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 2]), 3)
    trained = TrainableGroups({}, (ExpertViews.of_some(NAME, stacked, 1, (1, 3, 4), EXPERTS),))
    (gradient,) = trained.take_gradients(touched(0, 3, 4))
    assert gradient.experts_U is not None
    assert gradient.experts_U.tolist() == [2], "its place in the stack"
    assert torch.equal(gradient.rows_of(gradient.parameter), torch.zeros(1, 2))
    torch.optim.SGD(trained.parameters(), lr=1.0).step()
    assert stacked.tolist() == [[0, 0], [0, 0], [-3, -4]]


def test_counts_of_another_number_of_experts_are_refused_for_some_experts_too() -> None:
    stacked = nn.Parameter(torch.zeros(2, 2))
    trained = TrainableGroups({}, (ExpertViews.of_some(NAME, stacked, 1, (0, 1), EXPERTS),))
    with pytest.raises(ValueError, match="touched must be bool"):
        trained.take_gradients(torch.zeros(2, 2, dtype=torch.bool))
