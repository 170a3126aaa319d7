"""Counting which experts the real (not padded) tokens were sent to.

Shapes: B sequences, S positions of this forward pass, T = B * S tokens, L layers with experts, E experts, K active.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import nn

from emberfed.errors import ModelError
from emberfed.models.padding import ModelInputs


@final
class ActivationCounter:
    """(token, slot) assignments to each expert, padding excluded."""

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        """Start at zero. Sums are kept on `device`, so that counting never waits for it."""
        self._taken_LE = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._fresh_LE = torch.zeros_like(self._taken_LE)
        self._mask_T: torch.Tensor | None = None
        self._seen: set[int] = set()

    @property
    def counts(self) -> torch.Tensor:
        """All counts so far: int64 (L, E), a copy on the CPU."""
        return (self._taken_LE + self._fresh_LE).to("cpu", copy=True)

    def take(self) -> torch.Tensor:
        """Return the counts since the last `take`, int64 (L, E) on the CPU; `counts` keeps the total."""
        fresh = self._fresh_LE.to("cpu", copy=True)
        self._taken_LE += self._fresh_LE
        self._fresh_LE.zero_()
        return fresh

    def begin(self, mask_BS: torch.Tensor | None) -> None:
        """Begin a forward pass of the model over the positions of this mask; None: nothing is padding.

        Raises: ModelError if the mask is not 2-D.
        """
        self._seen.clear()
        self._mask_T = None
        if mask_BS is None:
            return
        if mask_BS.dim() != 2:
            raise ModelError(
                f"activations can be counted with a 2-D attention mask (batch, positions) only, found shape "
                f"{tuple(mask_BS.shape)}"
            )
        self._mask_T = mask_BS.reshape(-1).to(torch.int64)

    def add(self, row: int, index_TK: torch.Tensor) -> None:
        """Count one layer's routing, once per forward pass: gradient checkpointing runs layers again in backward."""
        if row in self._seen:
            return
        self._seen.add(row)
        real_TK = torch.ones_like(index_TK) if self._mask_T is None else self._mask_T.unsqueeze(1).expand_as(index_TK)
        self._fresh_LE[row].scatter_add_(0, index_TK.reshape(-1), real_TK.reshape(-1))


@contextmanager
def counting(base: nn.Module, routers: Sequence[nn.Module], counter: ActivationCounter) -> Iterator[ActivationCounter]:
    """Let `counter` follow the forward passes of `base`, the decoder that is given `attention_mask`."""
    inputs = ModelInputs(base)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        counter.begin(inputs.mask(args, kwargs))

    def add(row: int, _: nn.Module, __: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
        counter.add(row, output[2].detach())

    with ExitStack() as stack:
        stack.callback(base.register_forward_pre_hook(begin, with_kwargs=True).remove)
        for row, router in enumerate(routers):
            stack.callback(router.register_forward_hook(partial(add, row)).remove)
        yield counter
