"""Which base model this is, by its very numbers."""

from __future__ import annotations

import hashlib

import torch
from torch import nn


def fingerprint(lm: nn.Module) -> str:
    """Return a SHA-256 of all parameters and saved buffers: names, types, shapes and bytes, on whatever device."""
    told = hashlib.sha256()
    for name, tensor in sorted(lm.state_dict(keep_vars=True).items()):
        told.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        told.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return told.hexdigest()
