"""The built-in world: a corpus of instructions and a tiny model pretrained on the world's plain text.

Beside it, images with classes and a small vision model pretrained on other classes (`builtin.images`). All are made by
this package alone, so the quickstart needs no network.
"""

from __future__ import annotations

from pathlib import Path

from emberfed.builtin.text import corpus, plain_text

__all__ = ["corpus", "model_path", "plain_text", "vision_model_path"]


def model_path() -> Path:
    """Return the folder of the built-in model (weights, tokenizer and the recipe that made them)."""
    return Path(__file__).parent / "model"


def vision_model_path() -> Path:
    """Return the folder of the built-in vision model (weights, its images' processing and the recipe)."""
    return Path(__file__).parent / "vision_model"
