"""Which base model this is, by its very numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from emberfed.models.offloaded import OffloadedWeight


def fingerprint(lm: nn.Module) -> str:
    """Return a SHA-256 of all parameters and saved buffers: names, types, shapes and bytes, wherever they are."""
    on_disk = {name: module for name, module in lm.named_modules() if isinstance(module, OffloadedWeight)}
    told = hashlib.sha256()
    for name, kept in sorted({**lm.state_dict(keep_vars=True), **on_disk}.items()):
        told.update(f"{name} {kept.dtype} {tuple(kept.shape)} ".encode())
        for piece in _experts(kept) if isinstance(kept, OffloadedWeight) else (kept.detach(),):
            numbers: Any = piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            told.update(numbers)
    return told.hexdigest()


def _experts(weight: OffloadedWeight) -> Iterator[torch.Tensor]:
    """Yield one expert after the other, so that never all of them are in memory."""
    for index in range(weight.shape[0]):
        yield weight.expert(index, weight.dtype)
