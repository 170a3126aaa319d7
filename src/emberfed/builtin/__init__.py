"""The built-in world: a corpus of instructions and a tiny model pretrained on the world's plain text.

Both are made by this package alone, so the quickstart needs no network.
"""

from __future__ import annotations

from pathlib import Path

from emberfed.builtin.text import corpus, plain_text

__all__ = ["corpus", "model_path", "plain_text"]


def model_path() -> Path:
    """Return the folder of the built-in model (weights, tokenizer and the recipe that made them)."""
    return Path(__file__).parent / "model"
