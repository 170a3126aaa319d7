"""PEFT's file format, and the only place that knows it.

An adapter becomes `adapter_config.json` and `adapter_model.safetensors`, which plain `PeftModel.from_pretrained` opens:

* Attention is ordinary LoRA on modules.
* Experts go through `target_parameters`. gate_proj and up_proj are one fused parameter, so their LoRA of rank R becomes
  one of rank 2R: A is [A_gate; A_up], B is block-diagonal, and `lora_alpha` doubles so that the scale stays the same.
* PEFT stores A expert by expert, (E * R, in), but B with the experts innermost, (out, R * E).
* Two parameters of one module are two nested wrappers: `down_proj` is the outer one, `gate_up_proj` the inner one, with
  `base_layer` in its keys.
* A trained router is a copy of the module in `modules_to_save`.

PEFT 0.21 reads `rank_pattern` for parameters too, but warns that a pattern matched nothing unless it also matches a
module. Opening an adapter without attention therefore shows that warning; the ranks are right all the same.

Shapes: E experts, R rank, D hidden, F expert hidden.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import peft
import safetensors.torch
import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError

from emberfed.errors import ModelError
from emberfed.models.lora import check
from emberfed.models.sparse_model import SparseModel
from emberfed.records import Json

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"

_KEY = re.compile(r"base_model\.model\.(?P<path>.*?layers\.(?P<layer>\d+)\.(?P<module>.+))\.weight")
_Tensors = dict[str, torch.Tensor]


class _Size(NamedTuple):
    rank: int
    alpha: float


def to_files(tensors: Mapping[str, torch.Tensor], alpha: float, model: SparseModel) -> dict[str, bytes]:
    """Return the two files of a PEFT adapter by name; the same adapter always gives the same bytes.

    Raises: ModelError as `to_peft`.
    """
    config, converted = to_peft(tensors, alpha, model, model.lm.name_or_path)
    return {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS_FILE: safetensors.torch.save(converted, {"format": "pt"}),
    }


def to_peft(
    tensors: Mapping[str, torch.Tensor], alpha: float, model: SparseModel, base_path: str
) -> tuple[dict[str, Json], _Tensors]:
    """Return PEFT's configuration and tensors for an adapter of `model`.

    Args:
        tensors: By canonical name (see `lora`).
        alpha: The scale is alpha / R.
        model: The model it belongs to.
        base_path: Hub id or folder of the model, for PEFT to find it again.

    Raises: ModelError if the adapter does not fit the model, is empty, or gate_proj and up_proj differ in rank.
    """
    check(model, tensors)
    if not tensors:
        raise ModelError("an adapter without tensors cannot be written in PEFT's format")
    family = model.family
    experts_path = f"{family.block}.{family.experts}"
    converted: _Tensors = {}
    sizes: dict[tuple[int, str], _Size] = {}
    routers = False
    for name, a in sorted(tensors.items()):
        layer, part = _split(name)
        prefix = f"base_model.model.{family.layers}.{layer}"
        path = f"layers.{layer}.{part}"
        if part == "router.weight":
            converted[f"{prefix}.{family.block}.{family.router}.weight"] = a
            routers = True
        elif name.endswith(".lora_B") or part.startswith("experts.up_proj"):
            continue  # written with its lora_A, or with gate_proj
        elif part.startswith("self_attn."):
            linear = part.removesuffix(".lora_A").replace("self_attn", family.attention)
            sizes[layer, linear] = _Size(a.shape[0], alpha)
            converted[f"{prefix}.{linear}.lora_A.weight"] = a
            converted[f"{prefix}.{linear}.lora_B.weight"] = tensors[path.removesuffix("A") + "B"]
        elif part.startswith("experts.down_proj"):
            sizes[layer, f"{experts_path}.down_proj"] = _Size(a.shape[1], alpha)
            _flatten(converted, f"{prefix}.{experts_path}", a, tensors[path.removesuffix("A") + "B"])
        else:
            fused_a, fused_b = _fuse(tensors, f"layers.{layer}.experts")
            sizes[layer, f"{experts_path}.gate_up_proj"] = _Size(fused_a.shape[1], 2 * alpha)
            _flatten(converted, f"{prefix}.{experts_path}.base_layer", fused_a, fused_b)
    config = _config(sizes, experts_path, base_path)
    if routers:
        config["modules_to_save"] = [f"{family.block}.{family.router}"]
    # Copies of their own, since safetensors refuses tensors that share memory.
    return config, {key: value.detach().to("cpu", copy=True).contiguous() for key, value in converted.items()}


def _split(name: str) -> tuple[int, str]:
    _, layer, part = name.split(".", 2)
    return int(layer), part


def _fuse(tensors: Mapping[str, torch.Tensor], path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the LoRA of rank 2R on the fused gate_up_proj: (E, 2R, D) and (E, 2F, 2R)."""
    a_gate, a_up = tensors[f"{path}.gate_proj.lora_A"], tensors[f"{path}.up_proj.lora_A"]
    b_gate, b_up = tensors[f"{path}.gate_proj.lora_B"], tensors[f"{path}.up_proj.lora_B"]
    rank = a_gate.shape[1]
    if a_up.shape[1] != rank:
        raise ModelError(
            f"{path}: gate_proj has rank {rank} and up_proj {a_up.shape[1]}; "
            f"PEFT's format needs one rank for both, since they are one parameter"
        )
    pad = torch.nn.functional.pad
    return torch.cat([a_gate, a_up], 1), torch.cat([pad(b_gate, (0, rank)), pad(b_up, (rank, 0))], 1)


def _flatten(converted: _Tensors, key: str, a_ERI: torch.Tensor, b_EOR: torch.Tensor) -> None:
    converted[f"{key}.lora_A.weight"] = a_ERI.flatten(0, 1)
    converted[f"{key}.lora_B.weight"] = b_EOR.permute(1, 2, 0).flatten(1)


def _unflatten(
    tensors: Mapping[str, torch.Tensor], key: str, path: str, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (tensors[f"{key}.lora_{factor}.weight"] for factor in "AB")
    if a.shape[0] % rank or b.shape[1] != a.shape[0]:
        raise ModelError(f"{path}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not of rank {rank}")
    return a.view(-1, rank, a.shape[1]), b.view(b.shape[0], rank, -1).permute(2, 0, 1).contiguous()


def _config(sizes: Mapping[tuple[int, str], _Size], experts_path: str, base_path: str) -> dict[str, Json]:
    """Return the configuration; targets whose rank is not the default one are listed in patterns."""
    targets = {target for _, target in sizes}
    parameters = sorted(target for target in targets if target.startswith(f"{experts_path}."))
    fused = [size for (_, target), size in sizes.items() if target.endswith(".gate_up_proj")]
    default = fused[0] if fused else next(iter(sizes.values()), _Size(1, 1.0))
    patterns = _patterns(sizes, default)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "peft_version": peft.__version__,
        "base_model_name_or_path": base_path,
        "r": default.rank,
        "lora_alpha": default.alpha,
        "target_modules": sorted(targets - set(parameters)),
        "target_parameters": parameters or None,
        "rank_pattern": {pattern: size.rank for pattern, size in patterns.items()},
        "alpha_pattern": {pattern: size.alpha for pattern, size in patterns.items()},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }


def _patterns(sizes: Mapping[tuple[int, str], _Size], default: _Size) -> dict[str, _Size]:
    """Return one regular expression per size that is not the default; a layer is named only where layers differ."""
    found: dict[str, set[_Size]] = {}
    for (_, target), size in sizes.items():
        found.setdefault(target, set()).add(size)
    names: dict[_Size, set[str]] = {}
    for (layer, target), size in sizes.items():
        if size != default:
            name = target if len(found[target]) == 1 else f"layers.{layer}.{target}"
            names.setdefault(size, set()).add(re.escape(name))
    return {"|".join(sorted(group)): size for size, group in names.items()}


def from_peft(folder: Path) -> tuple[_Tensors, float]:
    """Return an adapter's tensors by canonical name, and its alpha, from a folder that `to_files` or PEFT wrote.

    Raises: ModelError if the folder cannot be read, or holds what our adapters cannot express.
    """
    config, tensors = _read(folder)
    result: _Tensors = {}
    alphas: dict[str, float] = {}
    for key in sorted(tensors):
        match = _KEY.fullmatch(key)
        if match is None:
            raise ModelError(
                f"{folder}: tensor {key!r} is not of a decoder layer; only attention and experts are known"
            )
        module, factor = match["module"], match["module"].rpartition(".")[2]
        if factor == "lora_B":
            continue  # read with its lora_A
        if factor != "lora_A":
            result[f"layers.{match['layer']}.router.weight"] = tensors[key]
            continue
        converted, alpha = _from_pair(config, tensors, key, match["layer"], module.removesuffix(".lora_A"))
        result |= converted
        alphas[key] = alpha
    alpha = next(iter(alphas.values()), math.nan)
    for key, other in alphas.items():
        if not math.isclose(alpha, other):
            raise ModelError(f"{folder}: {key!r} has alpha {other:g}, others {alpha:g}; our adapters have one alpha")
    if math.isnan(alpha):
        raise ModelError(f"{folder}: no LoRA in it")
    return dict(sorted(result.items())), alpha


def _from_pair(
    config: Mapping[str, Json], tensors: Mapping[str, torch.Tensor], key: str, layer: str, module: str
) -> tuple[_Tensors, float]:
    """Return the canonical tensors of one lora_A and its lora_B, and their alpha."""
    stem = key.removesuffix(".lora_A.weight")
    if f"{stem}.lora_B.weight" not in tensors:
        raise ModelError(f"{key!r} has no lora_B beside it; the adapter is damaged")
    attention = re.fullmatch(r"self_attn\.(\w+)", module)
    if attention:
        size = _size_of(config, stem)
        path = f"layers.{layer}.self_attn.{attention[1]}"
        return _named(path, tensors[key], tensors[f"{stem}.lora_B.weight"]), size.alpha
    expert = re.fullmatch(r"(.*\.experts)(\.base_layer)?", module)
    if expert is None:
        raise ModelError(f"{key!r} is LoRA on {module!r}; only attention and routed experts are known")
    _check_targets(config, key)
    path, outer = f"layers.{layer}.experts", stem.removesuffix(".base_layer")
    if expert[2] is None:
        size = _size_of(config, f"{outer}.down_proj")
        return _named(f"{path}.down_proj", *_unflatten(tensors, stem, path, size.rank)), size.alpha
    size = _size_of(config, f"{outer}.gate_up_proj")
    return _unfuse(path, *_unflatten(tensors, stem, path, size.rank)), size.alpha / 2


def _named(path: str, a: torch.Tensor, b: torch.Tensor) -> _Tensors:
    return {f"{path}.lora_A": a, f"{path}.lora_B": b}


def _unfuse(path: str, a_ERD: torch.Tensor, b_EOR: torch.Tensor) -> _Tensors:
    """Inverse of `_fuse`. Raises: ModelError if B is not block-diagonal."""
    rank, inner = a_ERD.shape[1] // 2, b_EOR.shape[1] // 2
    gate, up = b_EOR[:, :inner], b_EOR[:, inner:]
    if a_ERD.shape[1] % 2 or gate[..., rank:].any() or up[..., :rank].any():
        raise ModelError(
            f"{path}.gate_up_proj: its LoRA mixes gate_proj and up_proj; only adapters that keep them apart are known"
        )
    return {
        **_named(f"{path}.gate_proj", a_ERD[:, :rank].contiguous(), gate[..., :rank].contiguous()),
        **_named(f"{path}.up_proj", a_ERD[:, rank:].contiguous(), up[..., rank:].contiguous()),
    }


def _check_targets(config: Mapping[str, Json], key: str) -> None:
    """With one parameter alone PEFT's keys do not say which it is."""
    targets: Sequence[str] = config.get("target_parameters") or ()
    if {target.rpartition(".")[2] for target in targets} != {"gate_up_proj", "down_proj"}:
        raise ModelError(f"{key!r}: target_parameters must be the experts' gate_up_proj and down_proj, found {targets}")


def _size_of(config: Mapping[str, Json], target: str) -> _Size:
    """Return rank and alpha PEFT gives to a module or parameter, by its own matching of patterns."""

    def value(pattern: str, default: str) -> Any:
        patterns = config.get(pattern) or {}
        return patterns.get(get_pattern_key(patterns, target), config[default])

    return _Size(int(value("rank_pattern", "r")), float(value("alpha_pattern", "lora_alpha")))


def _read(folder: Path) -> tuple[dict[str, Json], _Tensors]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"{folder} is not a readable PEFT adapter: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= set(config):
        raise ModelError(f"{folder / CONFIG_FILE}: not the configuration of a LoRA")
    for option in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if config.get(option):
            raise ModelError(f"{folder / CONFIG_FILE}: {option} is not supported; only plain LoRA is")
    return config, tensors
