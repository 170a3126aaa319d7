"""Padding does not go to experts: computing them for it costs as much as for a word, and nobody reads the result.

Shapes: B sequences, S positions of this forward pass, T = B * S tokens, K active experts, E experts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, final

import torch
from torch import nn


@final
class ModelInputs:
    """Reads what a decoder was called with."""

    def __init__(self, base: nn.Module) -> None:
        """Read calls of `base`, the decoder that is given `attention_mask`."""
        self._signature = inspect.signature(base.forward)

    def mask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor | None:
        """Return the attention mask of the positions of this pass, if there is one: (B, S) where it is 2-D.

        With a cache the mask given also covers older positions.
        """
        given = self._signature.bind_partial(*args, **kwargs).arguments
        inputs = given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        mask = given.get("attention_mask")
        if inputs is None or not isinstance(mask, torch.Tensor) or mask.dim() != 2:
            return mask if isinstance(mask, torch.Tensor) else None
        return mask[:, mask.shape[1] - inputs.shape[1] :]


@final
class PaddingFilter:
    """Sends padded positions to no expert: the index of their experts becomes E."""

    def __init__(self, base: nn.Module, experts: Iterable[nn.Module] = ()) -> None:
        """Follow the forward passes of `base` and change what its `experts` are given, until `remove`."""
        self._inputs = ModelInputs(base)
        self._padding_T1: torch.Tensor | None = None
        self._hooks = [
            base.register_forward_pre_hook(self._begin, with_kwargs=True),
            *(module.register_forward_pre_hook(self._filter) for module in experts),
        ]

    @property
    def now(self) -> torch.Tensor | None:
        """True at the padding of the present forward pass, (T, 1); None if there is none, or no mask that tells."""
        return self._padding_T1

    def remove(self) -> None:
        """Leave the model as it was before."""
        while self._hooks:
            self._hooks.pop().remove()

    def as_now(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return `forward` bound to the padding of the pass in which it is first called, for running it again later."""
        padding_T1 = self._padding_T1

        def run(*args: Any, **kwargs: Any) -> Any:
            before, self._padding_T1 = self._padding_T1, padding_T1
            try:
                return forward(*args, **kwargs)
            finally:
                self._padding_T1 = before

        return run

    def _begin(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        mask_BS = self._inputs.mask(args, kwargs)
        self._padding_T1 = None
        if mask_BS is not None and mask_BS.dim() == 2 and not bool(mask_BS.all()):
            self._padding_T1 = (mask_BS == 0).reshape(-1, 1)

    def _filter(self, experts: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if self._padding_T1 is None:
            return None
        hidden_TD, index_TK, *rest = args
        return hidden_TD, index_TK.masked_fill(self._padding_T1, experts.num_experts), *rest
