"""Tiny but real federations for tests: a random model on disk, JSONL data, a config as users write it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = [f"w{number}" for number in range(10, 40)]
CATEGORIES = ("w3", "w4", "w5")


def write_records(path: Path, count: int = 48) -> Path:
    """Write instruction records whose answers follow from the context."""
    draw = np.random.default_rng(5)
    lines = []
    for number in range(count):
        words = [str(word) for word in draw.choice(WORDS, size=int(draw.integers(2, 6)), replace=False)]
        category = CATEGORIES[number % 3]
        answer = {"w3": words[0], "w4": WORDS[len(words)], "w5": " ".join(words)}[category]
        record = {"instruction": category, "context": " ".join(words), "response": answer}
        lines.append(json.dumps({**record, "category": category}))
    path.write_text("\n".join(lines) + "\n")
    return path


def config(model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """Return a config of four clients on three tiers that trains in a second; sections given replace its own keys."""
    values: dict[str, Any] = {
        "seed": 3,
        "model": {"path": str(model)},
        "method": {"name": "a3smoe"},
        "adapter": {"rank": 2, "alpha": 4},
        "data": {
            "path": str(data),
            "test_size": 6,
            "max_length": 64,
            "template": "short",
            "partition": {"kind": "dirichlet", "by": "category", "alpha": 1.0, "min_examples": 2},
        },
        "clients": {
            "count": 4,
            "tiers": [
                {"name": "small", "share": 0.5, "top_k": 1, "rank": 2},
                {"name": "middle", "share": 0.25, "top_k": 2, "rank": 3},
                {"name": "large", "share": 0.25, "top_k": 4, "rank": 4},
            ],
        },
        "training": {"rounds": 2, "batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 4, "batch_size": 8},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
    return values


def bits(run: Path) -> dict[str, str]:
    """Return a digest of every file of every whole round whose content does not depend on the clock."""
    files = sorted((run / "rounds").glob("[0-9][0-9][0-9][0-9]/**/*.safetensors"))
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
