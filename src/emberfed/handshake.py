"""What the server of a deployment and its clients must agree on, and where they do not.

Each question carries what the server has; the client compares before it answers, so that a client that was started
anew, or started wrongly, is found out whenever it comes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import emberfed
from emberfed import clients, provenance
from emberfed.config import RunConfig
from emberfed.data.images import Preprocessing
from emberfed.method import Method
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Json
from emberfed.seeds import Seeds

CLASSES = "classes"
"""Key of the classes' names, which the server alone knows in full."""

_SECTIONS = ("seed", "model", "method", "adapter", "training", "data", "evaluation")
_OF_EACH_ITS_OWN = {
    *("model.path", "model.revision", "model.tokenizer", "model.expert_storage", "model.device", "model.threads"),
    *("data.path", "data.split", "data.limit", "data.test_size", "data.partition"),
    *("data.format", "data.image", "data.text", "data.label"),
    *("evaluation.every", "evaluation.tiers"),
    *("training.rounds", "adapter.start_from"),
}
"""Settings that server and clients need not share: where things are, how data are laid out, what the server decides."""
_LONGEST_VALUE = 80


def described(
    config: RunConfig, model: FoundationModel, processor: Any, classes: Sequence[str], method: Method
) -> dict[str, Json]:
    """Return what one side has, as the other compares it.

    The adapter's layout is left out where it begins as a file, which the server alone has.

    Raises: ConfigError, ModelError if the method cannot begin on the model.
    """
    layout = {} if getattr(config.adapter, "start_from", None) else {"adapter": _layout(config, model, method)}
    return {
        "emberfed": emberfed.__version__,
        **{f"settings {key}": value for key, value in shared_settings(config).items()},
        **{f"model {key}": value for key, value in provenance.identity(model).items()},
        "tokenizer or preprocessing": _processing(processor),
        CLASSES: list(classes),
        **layout,
    }


def shared_settings(config: RunConfig) -> dict[str, Json]:
    """Return, by key, the settings that server and clients must share; of tiers, what they can afford."""
    values = config.values()
    flat: dict[str, Json] = {"seed": config.seed}
    for section in _SECTIONS[1:]:
        flat |= {f"{section}.{key}": value for key, value in values[section].items()}
    tiers = {
        f"tier {tier['name']}": {key: value for key, value in tier.items() if key not in ("name", "share", "device")}
        for tier in values["clients"]["tiers"]
    }
    return {**{key: value for key, value in flat.items() if key not in _OF_EACH_ITS_OWN}, **tiers}


def differences(server: Mapping[str, Json], client: Mapping[str, Json]) -> list[str]:
    """Return what differs, one phrase each; what only one side tells of is compared only if it is a setting."""
    told = []
    for key in sorted({*server, *client}):
        one, other = server.get(key), client.get(key)
        if key == "adapter" and (one is None or other is None):
            continue
        if one != other:
            told.append(f"{key}: the server has {_short(one)}, the client {_short(other)}")
    return told


def _layout(config: RunConfig, model: FoundationModel, method: Method) -> str:
    """Return a digest of names, shapes and types of the server's first state."""
    budgets = clients.resolve(config.clients.tiers, model.native_top_k, model.largest_top_k)
    state = method.init(model, budgets, Seeds(config.seed).at(purpose="init"))
    tensors = state.tensors
    rows = [[name, list(tensors[name].shape), str(tensors[name].dtype)] for name in sorted(tensors)]
    return _digest(rows)


def _processing(processor: Any) -> str:
    """Return a digest of how inputs are made of records."""
    if isinstance(processor, Preprocessing):
        return _digest([processor.processor.to_dict(), processor.values.tolist()])
    special = {name: str(token) for name, token in processor.special_tokens_map.items()}
    return _digest([processor.backend_tokenizer.to_str(), processor.chat_template, special])


def _digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _short(value: Json) -> str:
    text = "none" if value is None else json.dumps(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
