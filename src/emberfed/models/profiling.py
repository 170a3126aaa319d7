"""How a client's data uses a model's experts: how often, by which examples, and how much attention goes there.

FLUX (its sections are known to us second hand) makes this profile with a copy of the model in 4 bits; see `low_bits`.

Shapes: B sequences, S positions of a forward pass, T = B * S, K active experts, N examples, L layers with experts, E
experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Self, final

import torch
from torch import nn

from emberfed.errors import DataError, ModelError
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.received_attention import ReceivedAttention, receiving

_SIZES = ("tokens", "positions", "attended_pairs", "top_k")


@final
@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Which experts some examples use. Padding is in none of it, but where said.

    Attributes:
        tokens: Tokens that were routed.
        examples: Examples, N.
        top_k: Experts that were active per token.
        positions: Positions that went through the model, padding included: computing them costs as much.
        attended_pairs: (query, key) pairs per head and layer, padding included: the sum of batch x length squared.
        counts_LE: int64, (token, slot) assignments to each expert.
        attention_LE: float32, the mean attention that an expert's tokens receive in the attention of its layer (see
            `received_attention.attend`); 0 for an expert without tokens. None where it was not asked for.
        reached_NLE: Bool, whether an example sent a token to the expert: FLUX's D^e by membership.
    """

    tokens: int
    examples: int
    top_k: int
    positions: int
    attended_pairs: int
    counts_LE: torch.Tensor
    attention_LE: torch.Tensor | None
    reached_NLE: torch.Tensor

    @property
    def frequency_LE(self) -> torch.Tensor:  # noqa: N802 - the suffix says the shape
        """The share of tokens that go to each expert, float64; a layer's sum to K."""
        return self.counts_LE.double() / self.tokens

    @property
    def examples_LE(self) -> torch.Tensor:  # noqa: N802
        """Examples that reach each expert, int64: |D^e|."""
        return self.reached_NLE.sum(dim=0)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Return everything as named tensors."""
        tensors = {name: torch.tensor(getattr(self, name)) for name in _SIZES}
        tensors |= {"counts": self.counts_LE, "reached": self.reached_NLE}
        return tensors if self.attention_LE is None else tensors | {"attention": self.attention_LE}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Self:
        """Return the profile of `to_tensors`. Raises: ModelError if a tensor is missing, or they do not go together."""
        missing = [name for name in (*_SIZES, "counts", "reached") if name not in tensors]
        if missing:
            raise ModelError(f"a profile of {sorted(tensors)} lacks {missing}; make it again with profile()")
        shapes = [tensors["counts"].shape, tensors["reached"].shape[1:]]
        shapes += [tensors["attention"].shape] if "attention" in tensors else []
        if len(set(shapes)) > 1 or len(shapes[0]) != 2:
            told = ", ".join(str(tuple(shape)) for shape in shapes)
            raise ModelError(f"the tensors of a profile are not of the same layers and experts: {told}; make it again")
        return cls(
            **{name: int(tensors[name]) for name in _SIZES},
            examples=len(tensors["reached"]),
            counts_LE=tensors["counts"],
            attention_LE=tensors.get("attention"),
            reached_NLE=tensors["reached"],
        )


def profile(
    model: FoundationModel, batches: Iterable[tuple[torch.Tensor, torch.Tensor]], attention: bool = True
) -> Profile:
    """Run examples through a model, as it routes now, and return which experts they use.

    The head is not computed. Sums are in float64 and in the order of the batches, so the same input gives the same
    bits; other batches of the same examples give the same counts, unless two experts are within rounding.

    Args:
        model: The model, or a copy in fewer bits.
        batches: (input_ids, attention_mask), (B, S) each, in the order of the examples; padded left or right.
        attention: Whether to ask for received attention too, which computes attention more slowly.

    Raises: ModelError if the model is dense, or gives no attention weights; DataError if there is no token.
    """
    if model.is_dense:
        raise ModelError(f"{model.family.model_type} models are dense: there are no experts to profile")
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        received = stack.enter_context(receiving(model)) if attention else None
        uses = stack.enter_context(_watching(model, received))
        positions = attended_pairs = 0
        for input_ids_BS, mask_BS in batches:
            input_ids_BS, mask_BS = input_ids_BS.to(model.device), mask_BS.to(model.device)
            uses.begin(mask_BS)
            model.lm.base_model(input_ids=input_ids_BS, attention_mask=mask_BS, use_cache=False)
            positions += input_ids_BS.numel()
            attended_pairs += input_ids_BS.numel() * input_ids_BS.shape[1]
    if uses.tokens == 0:
        raise DataError("there is no token to profile experts with; give at least one example")
    counts_LE = torch.stack(uses.counts)
    attention_LE = torch.stack(uses.attention) / counts_LE.clamp(min=1)
    return Profile(
        tokens=uses.tokens,
        examples=uses.examples,
        top_k=model.top_k,
        positions=positions,
        attended_pairs=attended_pairs,
        counts_LE=counts_LE.to("cpu", torch.int64),
        attention_LE=attention_LE.to("cpu", torch.float32) if attention else None,
        reached_NLE=torch.stack([torch.cat(parts) for parts in uses.reached], dim=1).cpu(),
    )


@final
class _Uses:
    """Sums over forward passes."""

    def __init__(self, model: FoundationModel, received: ReceivedAttention | None) -> None:
        layers, experts = model.num_layers, model.num_experts
        self._received = received
        self._real_BS = torch.empty(0, 0)
        self.tokens = 0
        self.examples = 0
        self.counts = list(torch.zeros(layers, experts, dtype=torch.float64, device=model.device))
        self.attention = list(torch.zeros(layers, experts, dtype=torch.float64, device=model.device))
        self.reached: list[list[torch.Tensor]] = [[] for _ in range(layers)]

    def begin(self, mask_BS: torch.Tensor) -> None:
        """Begin a forward pass."""
        self._real_BS = (mask_BS != 0).double()
        self.tokens += int(self._real_BS.sum())
        self.examples += len(mask_BS)

    def add(self, row: int, layer: int, _: nn.Module, __: Any, output: tuple[torch.Tensor, ...]) -> None:
        """Take up what one router chose: (T, K) experts."""
        index_TK = output[2]
        # One matrix gives all three sums, each in a fixed order: scattered sums would not have one on every device.
        chosen_TE = self.counts[row].new_zeros(len(index_TK), len(self.counts[row])).scatter_(1, index_TK, 1.0)
        chosen_TE *= self._real_BS.view(-1, 1)
        self.counts[row] += chosen_TE.sum(dim=0)
        self.reached[row].append(chosen_TE.view(*self._real_BS.shape, -1).amax(dim=1) > 0)
        if self._received is not None:
            self.attention[row] += self._received.of(layer).double().view(-1) @ chosen_TE


@contextmanager
def _watching(model: FoundationModel, received: ReceivedAttention | None) -> Iterator[_Uses]:
    uses = _Uses(model, received)
    with ExitStack() as stack:
        for row, block in enumerate(model.blocks):
            stack.callback(block.router.register_forward_hook(partial(uses.add, row, block.layer)).remove)
        yield uses


@final
@dataclass(frozen=True, slots=True, eq=False)
class ProfileError:
    """How far a profile is from another of the same examples.

    Attributes:
        frequency_absolute: Mean over layers and experts of the absolute difference of frequencies.
        frequency_relative: The sum of those differences over the sum of the reference's frequencies.
        attention_absolute: Mean absolute difference of received attention; None where a profile has none.
        attention_relative: The sum of those differences over the sum of the reference's; None as above.
        overlap: Mean over layers of the share of the n most used experts that both profiles name.
        variation_L: float64, total variation between the layer's distributions of assignments over experts.
    """

    frequency_absolute: float
    frequency_relative: float
    attention_absolute: float | None
    attention_relative: float | None
    overlap: float
    variation_L: torch.Tensor


def error(found: Profile, reference: Profile, top: int) -> ProfileError:
    """Return how far `found` is from `reference`.

    Args:
        found: The profile in question: of a copy in fewer bits, or of an older model.
        reference: What it stands for.
        top: The n of `overlap`, 1 to E; of equally used experts the first ones count.

    Raises: ModelError if the profiles are of other models, or `top` is out of range.
    """
    experts = reference.counts_LE.shape[1]
    if found.counts_LE.shape != reference.counts_LE.shape or not 1 <= top <= experts:
        raise ModelError(
            f"profiles of {tuple(found.counts_LE.shape)} and {tuple(reference.counts_LE.shape)} (layers, experts) "
            f"cannot be compared over {top} experts; give two of the same model, and 1 to {experts}"
        )
    frequency = _difference(found.frequency_LE, reference.frequency_LE)
    attention: tuple[float, float] | tuple[None, None] = (None, None)
    if found.attention_LE is not None and reference.attention_LE is not None:
        attention = _difference(found.attention_LE, reference.attention_LE)
    return ProfileError(
        frequency_absolute=frequency[0],
        frequency_relative=frequency[1],
        attention_absolute=attention[0],
        attention_relative=attention[1],
        overlap=_overlap(found.counts_LE, reference.counts_LE, top),
        variation_L=(_shares(found.counts_LE) - _shares(reference.counts_LE)).abs().sum(dim=1) / 2,
    )


def _shares(counts_LE: torch.Tensor) -> torch.Tensor:
    return counts_LE.double() / counts_LE.sum(dim=1, keepdim=True)


def _difference(found_LE: torch.Tensor, reference_LE: torch.Tensor) -> tuple[float, float]:
    """Return the mean absolute difference, and the sum of differences over the reference's sum."""
    difference_LE = (found_LE.double() - reference_LE.double()).abs()
    return float(difference_LE.mean()), float(difference_LE.sum() / reference_LE.double().sum())


def _overlap(found_LE: torch.Tensor, reference_LE: torch.Tensor, top: int) -> float:
    best = [counts_LE.argsort(dim=1, descending=True, stable=True)[:, :top] for counts_LE in (found_LE, reference_LE)]
    both = [len(set(mine.tolist()) & set(theirs.tolist())) for mine, theirs in zip(*best, strict=True)]
    return sum(both) / (top * len(both))
