"""What a run is known by: the records of run.json and partition.json, and the checks that a run goes on as it began."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Collection
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

import emberfed
from emberfed.checkpoint import RunFolder
from emberfed.config import RunConfig
from emberfed.errors import RunFolderError
from emberfed.material import Material
from emberfed.models.fingerprint import fingerprint
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Json


def check_same_data(folder: RunFolder, material: Material) -> None:
    """Check that the data is what it was when the run began. Raises: RunFolderError."""
    if folder.read_json("partition.json") != material.members.record():
        raise RunFolderError(
            f"the data is not what it was when {folder.path} began (partition.json differs); "
            f"put the data back, or start a new run"
        )


def check_same_model(folder: RunFolder, model: FoundationModel, ignoring: Collection[str] = ()) -> None:
    """Check that the base model is the one the run began with, but for some of its record's keys.

    Raises: RunFolderError naming what differs.
    """
    began, now = folder.read_object("run.json").get("model"), identity(model)
    recorded = began if isinstance(began, dict) else {}
    changed = [key for key, value in now.items() if recorded.get(key) != value and key not in ignoring]
    if changed:
        raise RunFolderError(
            f"the base model is not the one {folder.path} began with ({', '.join(changed)} differ); put it back, or "
            f"start a new run"
        )


def check_same_settings(folder: RunFolder, config: RunConfig) -> None:
    """Check that config.yaml still says what the run began with, but for what may change.

    Raises: RunFolderError naming the keys that differ.
    """
    changed = changed_settings(folder, config)
    if changed:
        raise RunFolderError(
            f"{folder.path / 'config.yaml'} was changed since the run began ({', '.join(changed)}); one run is one "
            f"experiment: put it back, or start a new run"
        )


def changed_settings(folder: RunFolder, config: RunConfig) -> list[str]:
    """Return the keys of the settings that are not those the run began with, of those that must stay as they are."""
    began, now = folder.read_object("run.json").get("settings", {}), fixed_settings(config)
    return sorted(key for key in {*began, *now} if began.get(key) != now.get(key))


PLACES = ("data.path", "model.path", "adapter.start_from")
"""Settings that say where something is; it may move while a run goes on."""


def fixed_settings(config: RunConfig) -> dict[str, Json]:
    """Return, by key, the settings that must stay as they are for the whole of a run."""
    flat = {
        f"{section}.{key}": value
        for section, values in config.values().items()
        if section not in ("seed", "engine", "output", "evaluation")
        for key, value in values.items()
    }
    free = ("training.rounds", "clients.min_replies", "model.threads", "model.device", *PLACES)
    return {"seed": config.seed, **{key: value for key, value in flat.items() if key not in free}}


def identity(model: FoundationModel) -> dict[str, Json]:
    """Return what tells one base model from another."""
    shape = model.shape
    return {
        "family": model.family.model_type,
        "parameters": shape.parameters,
        "layers": shape.num_layers,
        "num_experts": shape.num_experts,
        "native_top_k": shape.native_top_k,
        "sha256": fingerprint(model.lm),
    }


_LIMITS = ("rank", "adapter_top_k", "tuned_experts", "held_experts")
"""What a tier may limit besides K."""


def describe(config: RunConfig, name: str, material: Material) -> dict[str, Json]:
    """Return what run.json keeps: versions, seeds, hardware, model, data, tiers, the method's paper."""
    share = {tier.name: tier.share for tier in config.clients.tiers}
    return {
        "name": name,
        "emberfed_version": emberfed.__version__,
        "git": _git_hash(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": config.seed,
        "method": {
            "name": config.method_name,
            "title": config.method_type.title,
            "paper": config.method_type.paper,
        },
        "versions": versions(),
        "hardware": hardware(),
        "metric": config.task.metric.key,
        **({"classes": list(material.classes)} if material.classes else {}),
        "experts": config.method_type.experts,
        "model": {"path": config.model.path, **identity(material.model)},
        "data": material.members.totals(),
        "settings": fixed_settings(config),
        "tiers": [
            {
                "name": budget.tier,
                "top_k": budget.top_k,
                "share": share[budget.tier],
                **{key: value for key in _LIMITS if (value := getattr(budget, key)) is not None},
                **({} if budget.device is None else {"device": budget.device.model_dump(mode="json")}),
            }
            for budget in material.budgets
        ],
    }


def versions() -> dict[str, str]:
    """Return the versions of the libraries that results depend on."""
    names = ("torch", "transformers", "peft", "datasets", "flwr-datasets", "safetensors", "tokenizers", "numpy")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def hardware() -> dict[str, Any]:
    """Return what this machine offers."""
    cuda = torch.cuda.is_available()
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "accelerators": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        if cuda
        else [],
    }


def _git_hash() -> str | None:
    """Return the commit of the source tree, if emberfed runs from one."""
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
