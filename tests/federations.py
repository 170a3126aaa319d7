"""Tiny but real federations for tests: data of every task, a config as users write it, for any method."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from builders import CLASSES, save_tiny_family

from emberfed.federated_experts import ExpertTuningConfig
from emberfed.method import load_method, method_names
from emberfed.methods.dense_adapter import DenseAdapterConfig
from emberfed.methods.linear_probe import HeadConfig
from emberfed.models.lora import LoraConfig
from emberfed.models.sparse_adapter import SparseAdapterConfig
from emberfed.sections import Section

WORDS = [f"w{number}" for number in range(10, 40)]
CATEGORIES = ("w3", "w4", "w5")

ADAPTERS: Mapping[type[Section], dict[str, Any]] = {
    LoraConfig: {"rank": 2, "alpha": 4},
    SparseAdapterConfig: {"num_experts": 4, "expert_size": 3},
    DenseAdapterConfig: {"size": 4},
    HeadConfig: {},
    ExpertTuningConfig: {"rank": 2, "alpha": 4},
}
"""A tiny adapter of every kind that methods train."""

_ALL_OF_A_LAYER = {"tuned_experts": 4, "held_experts": 8}

_DATA: Mapping[str, dict[str, Any]] = {
    "generation": {"max_length": 64, "template": "short"},
    "text_classification": {"max_length": 16},
    "image_classification": {},
}
"""What the data of a task needs besides the keys of all tasks."""


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


def write_texts(path: Path, count: int = 50) -> Path:
    """Write texts of 2 to 6 words whose class is that of their first word, as many of each class."""
    draw = np.random.default_rng(6)
    lines = []
    for number in range(count):
        words = [str(word) for word in draw.choice(WORDS, size=int(draw.integers(2, 7)), replace=False)]
        text = " ".join([f"w{3 + number % len(CLASSES)}", *words])
        lines.append(json.dumps({"text": text, "label": CLASSES[number % len(CLASSES)]}))
    path.write_text("\n".join(lines) + "\n")
    return path


def write_images(folder: Path, count: int = 50) -> Path:
    """Write a sub-folder for each class, with noise of 8 x 8 pixels that is the brighter the later the class."""
    draw = np.random.default_rng(7)
    for number in range(count):
        label = number % len(CLASSES)
        (folder / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(40 * label, 40 * label + 80, (8, 8, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / CLASSES[label] / f"{number}.png")
    return folder


def write_data(task: str, folder: Path) -> Path:
    """Write data of a task into a folder and return what `data.path` takes."""
    if task == "generation":
        return write_records(folder / "data.jsonl")
    return write_texts(folder / "data.jsonl") if task == "text_classification" else write_images(folder / "images")


def config(model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """Return a config of four clients on three tiers that trains in a second; sections given replace its own keys.

    Adapter and tiers are as the method has them; models that choose a class are dense, so that K is 1 in all tiers.
    """
    task = sections.get("data", {}).get("task", "generation")
    method = {"name": "a3smoe", **sections.get("method", {})}
    chosen = load_method(method["name"] if method["name"] in method_names() else "a3smoe")
    tiers = [
        {"name": "small", "share": 0.5, "top_k": 1, "rank": 2},
        {"name": "middle", "share": 0.25, "top_k": 2, "rank": 3},
        {"name": "large", "share": 0.25, "top_k": 4, "rank": 4},
    ]
    if chosen.experts == "adapter":
        tiers = [{**tier, "adapter_top_k": tier["top_k"]} for tier in tiers]
    if chosen.AdapterConfig is ExpertTuningConfig:
        room = ({"tuned_experts": 2, "held_experts": 6}, {"tuned_experts": 3, "held_experts": 7}, _ALL_OF_A_LAYER)
        tiers = [{**tier, **more} for tier, more in zip(tiers, room, strict=True)]
    storage = {"expert_storage": "disk"} if method["name"] == "fmd" else {}
    values: dict[str, Any] = {
        "seed": 3,
        "model": {"path": str(model), **storage},
        "method": {"name": "a3smoe"},
        "adapter": ADAPTERS[chosen.AdapterConfig],
        "data": {
            "path": str(data),
            "test_size": 6,
            "partition": {"kind": "dirichlet", "by": "category", "alpha": 1.0, "min_examples": 2},
            **_DATA.get(task, {}),
        },
        "clients": {
            "count": 4,
            "tiers": tiers if task == "generation" else dense(tiers),
        },
        "training": {"rounds": 2, "batch_size": 4, "learning_rate": 1e-2},
        "evaluation": {"max_new_tokens": 4, "batch_size": 8},
    }
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and name in values else section
    return values


@dataclass(frozen=True)
class Vision:
    """A tiny ViT and a folder of images, of which configs are made."""

    model: Path
    data: Path

    @staticmethod
    def made(folder: Path) -> Vision:
        """Write both into a folder."""
        return Vision(save_tiny_family("vit", folder / "vit"), write_images(folder / "images"))

    def config(self, **sections: Any) -> dict[str, Any]:
        """Return a config of image classification; sections given replace its own keys."""
        data = {"task": "image_classification", **sections.get("data", {})}
        return config(self.model, self.data, **{**sections, "data": data})


def dense(tiers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tiers for a dense model, which has one expert."""
    return [{**tier, "top_k": 1} for tier in tiers]


def bits(run: Path) -> dict[str, str]:
    """Return a digest of every file of every whole round whose content does not depend on the clock."""
    files = sorted((run / "rounds").glob("[0-9][0-9][0-9][0-9]/**/*.safetensors"))
    return {str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
