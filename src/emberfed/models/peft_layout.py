"""PEFT's file format, and the only place that knows it.

An adapter becomes `adapter_config.json` and `adapter_model.safetensors`, which plain `PeftModel.from_pretrained` opens:

* Attention is ordinary LoRA on modules.
* Routed experts go through `target_parameters`. gate_proj and up_proj are one fused parameter, so their LoRA become one
  whose rank is the sum of theirs: A is [A_gate; A_up], B is block-diagonal, and `lora_alpha` grows so that gate's scale
  stays the same. Where up's rank is another, the difference in scale goes into B.
* Rows of the fused B are gate's, then up's; where the family stores gate and up alternating (GPT-OSS), so are the rows.
* PEFT stores A expert by expert, (E * R, in), but B with the experts innermost, (out, R * E), whether the weights
  themselves are stored transposed or not.
* Two parameters of one module are two nested wrappers: `down_proj` is the outer one, `gate_up_proj` the inner one, with
  `base_layer` in its keys. One alone has no `base_layer`, and only `target_parameters` says which it is.
* MLPs are ordinary LoRA on modules in a dense model. Beside routed experts, those of shared experts and of layers
  without experts go through `target_parameters` too: PEFT takes modules called gate_proj, up_proj and down_proj for the
  routed experts of older transformers.
* A trained router is a copy of the module in `modules_to_save`, with all it has; only its weight may differ.
* A classifier's head is one, too, and all of it is trained.
* A target is named by layer where not all layers that could have it do, or where its name ends another's.
* GPT-2 stores weights transposed, which PEFT is told (`fan_in_fan_out`); A and B are the same whether or not.

Reading is the inverse, bit by bit. It also takes what PEFT's users make: any part of the above, patterns of rank and
alpha, rank-stabilised scale. A fused LoRA that mixes gate and up, of rank R, is exactly gate (A, B_gate) and up
(A, B_up), each of rank R; it would be written again with rank 2R. Where tensors differ in alpha, the most common one
serves and the others' B are multiplied by the difference.

PEFT 0.21 reads `rank_pattern` for parameters too, but warns that a pattern matched nothing unless it also matches a
module. Opening an adapter without attention therefore shows that warning; the ranks are right all the same.

Shapes: E experts, R rank, D hidden, F expert hidden.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import peft
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from transformers.pytorch_utils import Conv1D

from emberfed.errors import ModelError, closest
from emberfed.models.foundation_model import FoundationModel, Slot, SparseBlock
from emberfed.models.fused_lora import StackedLora, alternating, flatten, fuse, one_after_the_other, unflatten, unfuse
from emberfed.models.head import head_parameters
from emberfed.models.lora_layout import attention_linears, check, mlp_linears, shared_linears
from emberfed.models.peft_settings import PeftSettings, Size
from emberfed.models.routed_lora import MATRICES
from emberfed.records import Json

CONFIG_FILE = "adapter_config.json"
TENSORS_FILE = "adapter_model.safetensors"
PEFT_SERIES = "0.21"
"""The releases of PEFT whose format is tested; others are refused."""

_PREFIX = "base_model.model."
_OTHER_FACTOR = {"lora_A": "lora_B", "lora_B": "lora_A"}
_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
_OTHER_LORA = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "velora_config", "kasa_config",
    "alora_invocation_tokens", "monteclora_config", "arrow_config", "layer_replication", "trainable_token_indices",
)  # fmt: skip
_CHANGES_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_STORED = ("F64", "F32", "F16", "BF16")
_Tensors = dict[str, torch.Tensor]


class _Target(NamedTuple):
    """One LoRA as PEFT sees it.

    Attributes:
        name: Dotted path of the module, or of the parameter.
        key: Dotted path that its tensors' keys begin with.
        a: lora_A as stored.
        b: lora_B as stored.
        size: Rank and alpha.
    """

    name: str
    key: str
    a: torch.Tensor
    b: torch.Tensor
    size: Size


class _Paths(NamedTuple):
    """Where the model has what our names speak of: dotted paths in transformers, by canonical path.

    Linear layers are PEFT's `modules`, or `parameters` where it has to be told of their weights.
    """

    modules: Mapping[str, str]
    parameters: Mapping[str, str]
    experts: Mapping[str, str]
    routers: Mapping[str, str]

    @staticmethod
    def of(model: FoundationModel) -> _Paths:
        names = {module: name for name, module in model.lm.named_modules()}

        def named(linears: Mapping[str, Slot]) -> dict[str, str]:
            return {path: f"{names[module]}.{name}" for path, (module, name) in linears.items()}

        attention, mlps = named(attention_linears(model)), named({**shared_linears(model), **mlp_linears(model)})
        return _Paths(
            {**attention, **mlps} if model.is_dense else attention,
            {} if model.is_dense else mlps,
            {f"layers.{block.layer}.experts": names[block.experts] for block in model.blocks},
            {f"layers.{block.layer}.router": names[block.router] for block in model.blocks},
        )

    def targets(self) -> list[str]:
        """Return everything in the model that LoRA may target: modules and parameters."""
        return [
            *self.modules.values(),
            *(f"{name}.weight" for name in self.parameters.values()),
            *(f"{name}.{part}" for name in self.experts.values() for part in (_GATE_UP, _DOWN)),
        ]


def check_version(version: str | None, whose: str) -> None:
    """Check that a version of PEFT is one whose format is known here.

    Args:
        version: Such as `0.21.2`; None if it is not known.
        whose: Who is of that version, the beginning of the error's line.

    Raises: ModelError naming both versions.
    """
    if version is None or version.split(".")[:2] != PEFT_SERIES.split("."):
        raise ModelError(
            f"{whose} PEFT {version or 'of an unknown version'}, but only the format of PEFT {PEFT_SERIES} is tested; "
            f"use peft {PEFT_SERIES}.* (an older adapter: open it with that, save it again)"
        )


def to_files(tensors: Mapping[str, torch.Tensor], alpha: float, model: FoundationModel) -> dict[str, bytes]:
    """Return the two files of a PEFT adapter by name; the same adapter always gives the same bytes.

    Raises: ModelError as `to_peft`.
    """
    config, converted = to_peft(tensors, alpha, model, model.lm.name_or_path)
    return {
        CONFIG_FILE: (json.dumps(config, indent=2, sort_keys=True) + "\n").encode(),
        TENSORS_FILE: safetensors.torch.save(converted, {"format": "pt"}),
    }


def to_peft(
    tensors: Mapping[str, torch.Tensor], alpha: float, model: FoundationModel, base_path: str
) -> tuple[dict[str, Json], _Tensors]:
    """Return PEFT's configuration and tensors for an adapter of `model`.

    Args:
        tensors: By canonical name (see `lora_layout`).
        alpha: The scale is alpha / R.
        model: The model it belongs to.
        base_path: Hub id or folder of the model, for PEFT to find it again.

    Raises: ModelError if the adapter does not fit the model or has no LoRA, or PEFT is not of a tested version.
    """
    check_version(peft.__version__, "installed is")
    check(model, tensors)
    rescalers = sorted(name for name in tensors if name.endswith(".rescaler"))
    if rescalers:
        raise ModelError(f"{rescalers[0]!r} has no place in PEFT's format; leave the rescalers out")
    paths = _Paths.of(model)
    targets = [*_linears(tensors, alpha, paths), *_experts(tensors, alpha, paths, model)]
    if not targets:
        raise ModelError("an adapter without LoRA cannot be written in PEFT's format")
    routers = {f"layers.{block.layer}.router": block.router for block in model.blocks}
    trained = {path: router for path, router in routers.items() if f"{path}.weight" in tensors}
    converted: _Tensors = {}
    for path, router in trained.items():  # whole, since PEFT looks for all of the module
        state = {**router.state_dict(), "weight": tensors[f"{path}.weight"]}
        converted |= {f"{_PREFIX}{paths.routers[path]}.{name}": value for name, value in state.items()}
    for target in targets:
        converted[f"{_PREFIX}{target.key}.lora_A.weight"] = target.a
        converted[f"{_PREFIX}{target.key}.lora_B.weight"] = target.b
    config = _config(targets, paths.targets(), base_path, model)
    whole: list[Json] = [*_names([paths.routers[path] for path in trained], paths.routers.values())] if trained else []
    head = {name: tensors[name] for name in head_parameters(model) if name in tensors}
    if head:
        whole.append(model.family.head)
        converted |= {_head_key(name, model): value for name, value in head.items()}
    if whole:
        config["modules_to_save"] = whole
    # Copies of their own, since safetensors refuses tensors that share memory.
    return config, {key: value.detach().to("cpu", copy=True).contiguous() for key, value in converted.items()}


def _linears(tensors: Mapping[str, torch.Tensor], alpha: float, paths: _Paths) -> list[_Target]:
    places = [(path, name, name) for path, name in paths.modules.items()]
    places += [(path, f"{name}.weight", name) for path, name in paths.parameters.items()]
    return [
        _Target(target, key, a, tensors[f"{path}.lora_B"], Size(a.shape[0], alpha))
        for path, target, key in places
        if (a := tensors.get(f"{path}.lora_A")) is not None
    ]


def _experts(tensors: Mapping[str, torch.Tensor], alpha: float, paths: _Paths, model: FoundationModel) -> list[_Target]:
    """Return the LoRA of the routed experts, up to two for each layer."""
    targets = []
    for block in model.blocks:
        path = f"layers.{block.layer}.experts"
        name = paths.experts[path]
        loras = {
            matrix: StackedLora(a, tensors[f"{path}.{matrix}.lora_B"], alpha)
            for matrix in MATRICES
            if (a := tensors.get(f"{path}.{matrix}.lora_A")) is not None
        }
        down = loras.pop("down_proj", None)
        if loras:
            fused = fuse(loras)
            if not block.experts.is_concatenated:
                fused = fused._replace(b=alternating(fused.b))
            key = name if down is None else f"{name}.base_layer"
            targets.append(_Target(f"{name}.{_GATE_UP}", key, *flatten(fused), Size(fused.rank, fused.alpha)))
        if down is not None:
            targets.append(_Target(f"{name}.{_DOWN}", name, *flatten(down), Size(down.rank, down.alpha)))
    return targets


def _head_key(name: str, model: FoundationModel) -> str:
    """Return the key of a head's parameter."""
    return f"{_PREFIX}{model.family.head}.{name.removeprefix('head.')}"


def _config(
    targets: Sequence[_Target], possible: Collection[str], base_path: str, model: FoundationModel
) -> dict[str, Json]:
    """Return the configuration; targets whose rank or alpha is not the default one are listed in patterns."""
    modules = [target.name for target in targets if target.name == target.key]
    parameters = [target.name for target in targets if target.name != target.key]
    default = next((target.size for target in targets if target.name.endswith(f".{_GATE_UP}")), targets[0].size)
    patterns = _patterns(targets, default)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.task == "generation" else None,
        "peft_version": peft.__version__,
        "base_model_name_or_path": base_path,
        "r": default.rank,
        "lora_alpha": default.alpha,
        "target_modules": _names(modules, possible),
        "target_parameters": _names(parameters, possible) or None,
        "rank_pattern": {pattern: size.rank for pattern, size in patterns.items()},
        "alpha_pattern": {pattern: size.alpha for pattern, size in patterns.items()},
        "lora_dropout": 0.0,
        "fan_in_fan_out": any(isinstance(getattr(*slot), Conv1D) for slot in attention_linears(model).values()),
        "bias": "none",
        "inference_mode": True,
    }


def _names(chosen: Collection[str], possible: Collection[str]) -> list[str]:
    """Return how PEFT is told of targets: by their name within the layer where that means no other, else one by one.

    PEFT takes a name for every dotted path that ends with it.
    """
    left_out = {_within_layer(target) for target in set(possible) - set(chosen)}
    found = set()
    for target in chosen:
        short = _within_layer(target)
        found.add(_with_layer(target) if any(_ends(other, short) for other in left_out) else short)
    return sorted(found)


def _ends(path: str, end: str) -> bool:
    return f".{path}".endswith(f".{end}")


def _with_layer(target: str) -> str:
    match = re.search(r"\w+\.\d+\..+", target)
    assert match is not None, "targets are in layers"
    return match[0]


def _within_layer(target: str) -> str:
    return _with_layer(target).split(".", 2)[2]


def _patterns(targets: Sequence[_Target], default: Size) -> dict[str, Size]:
    """Return one regular expression per size that is not the default; a layer is named only where layers differ."""
    found: dict[str, set[Size]] = {}
    for target in targets:
        found.setdefault(_within_layer(target.name), set()).add(target.size)
    names: dict[Size, set[str]] = {}
    for target in targets:
        if target.size != default:
            short = _within_layer(target.name)
            meant = {size for other, sizes in found.items() if _ends(other, short) for size in sizes}
            name = short if len(meant) == 1 else _with_layer(target.name)
            names.setdefault(target.size, set()).add(re.escape(name))
    return {"|".join(sorted(group)): size for size, group in names.items()}


def from_peft(folder: Path, model: FoundationModel) -> tuple[_Tensors, float]:
    """Return an adapter of `model`: float32 tensors by canonical name, and alpha, from a folder that PEFT can open.

    Raises: ModelError if the folder cannot be read, is of another version or model, or holds what our adapters cannot
    express.
    """
    settings, stored = _read(folder)
    try:
        loras, result = _parse(settings, stored, model)
        if not loras:
            raise ModelError("no LoRA in it")
        alpha = Counter(lora.alpha for lora in loras).most_common(1)[0][0]
        for lora in loras:
            b = lora.b.float()
            result[f"{lora.path}.lora_A"] = lora.a.float().contiguous()
            result[f"{lora.path}.lora_B"] = (b if lora.alpha == alpha else b * (lora.alpha / alpha)).contiguous()
        check(model, result)
        _check_finite(result)
    except ModelError as error:
        raise ModelError(f"PEFT adapter {folder}: {error}") from None
    return dict(sorted(result.items())), alpha


class _Found(NamedTuple):
    """One LoRA as we see it: canonical path, A, B, and the alpha with which its scale is alpha / R."""

    path: str
    a: torch.Tensor
    b: torch.Tensor
    alpha: float


def _parse(settings: PeftSettings, stored: _Tensors, model: FoundationModel) -> tuple[list[_Found], _Tensors]:
    """Return the LoRA, and the routers' weights and the head. Raises: ModelError at the first foreign tensor."""
    paths = _Paths.of(model)
    linears = {f"{_PREFIX}{name}": path for path, name in {**paths.modules, **paths.parameters}.items()}
    experts = {f"{_PREFIX}{paths.experts[f'layers.{block.layer}.experts']}": block for block in model.blocks}
    routers = {f"{_PREFIX}{name}.weight": f"{path}.weight" for path, name in paths.routers.items()}
    heads = {_head_key(name, model): name for name in head_parameters(model)}
    loras: list[_Found] = []
    result: _Tensors = {}
    for key in sorted(stored):
        stem, _, factor = key.removesuffix(".weight").rpartition(".")
        module = stem.removesuffix(".base_layer")
        if key in routers:
            result[routers[key]] = stored[key].float()
        elif key in heads:
            result[heads[key]] = stored[key].float()
        elif key.startswith(tuple(router.removesuffix("weight") for router in routers)):
            _check_unchanged(key, stored[key], model)
        elif factor not in _OTHER_FACTOR or not (stem in linears or module in experts):
            raise ModelError(_foreign(key, [*linears, *experts, *routers, *heads], model))
        elif f"{stem}.{_OTHER_FACTOR[factor]}.weight" not in stored:
            raise ModelError(f"{key!r} has no {_OTHER_FACTOR[factor]} beside it; the adapter is damaged")
        elif factor == "lora_A":
            a, b = stored[key], stored[f"{stem}.lora_B.weight"]
            if stem in linears:
                loras.append(_linear(settings, linears[stem], stem.removeprefix(_PREFIX), a, b))
            else:
                loras += _expert(settings, experts[module], stem.removeprefix(_PREFIX), a, b)
    return loras, result


def _check_unchanged(key: str, tensor: torch.Tensor, model: FoundationModel) -> None:
    """PEFT saves a router whole; what is not its weight must be as in the base."""
    base = model.lm.state_dict().get(key.removeprefix(_PREFIX))
    base = None if base is None else base.cpu()
    if base is None or not (torch.equal(base.to(tensor.dtype), tensor) or torch.equal(base, tensor.to(base.dtype))):
        raise ModelError(f"{key!r} is not what the model has; of routers only the weight can be trained")


def _foreign(key: str, known: Sequence[str], model: FoundationModel) -> str:
    if re.search(r"experts\.\d+\.", key):
        return (
            f"{key!r} is LoRA on a single expert's module, as in older transformers; open the adapter with "
            f"PeftModel.from_pretrained, save it again, and use that"
        )
    return (
        f"tensor {key!r} has no place in this {model.family.model_type} model; adapters are LoRA on attention, "
        f"experts and MLPs, trained routers and heads{closest(key.partition('.lora_')[0], known)}"
    )


def _linear(settings: PeftSettings, path: str, name: str, a: torch.Tensor, b: torch.Tensor) -> _Found:
    targeted = settings.targets(f"{name}.weight")  # PEFT adapts the parameter then, not the module
    size = settings.size_of(f"{name}.weight" if targeted else name)
    _check_rank(size, path, a, b, 1)
    return _Found(path, a, b, size.alpha)


def _expert(settings: PeftSettings, block: SparseBlock, name: str, a: torch.Tensor, b: torch.Tensor) -> list[_Found]:
    """Return the LoRA of one of the two stacked parameters of a layer's experts."""
    path, module = f"layers.{block.layer}.experts", name.removesuffix(".base_layer")
    targeted = [part for part in (_GATE_UP, _DOWN) if settings.targets(f"{module}.{part}")]
    inner = module != name
    if not targeted or (inner and len(targeted) == 1):
        raise ModelError(
            f"{path}: its keys do not go with target_parameters {settings.target_parameters}; "
            f"those must name the experts' {_GATE_UP}, {_DOWN} or both"
        )
    part = targeted[0] if inner else targeted[-1]
    size = settings.size_of(f"{module}.{part}")
    _check_rank(size, f"{path}.{part}", a, b, block.num_experts)
    lora = unflatten(a, b, *size)
    if part == _DOWN:
        return [_Found(f"{path}.down_proj", *lora)]
    if not block.experts.is_concatenated:
        lora = lora._replace(b=one_after_the_other(lora.b))
    return [_Found(f"{path}.{matrix}", *found) for matrix, found in unfuse(lora).items()]


def _check_rank(size: Size, path: str, a: torch.Tensor, b: torch.Tensor, experts: int) -> None:
    wanted = size.rank * experts
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != wanted or b.shape[1] != wanted:
        stack = f" for {experts} experts" if experts > 1 else ""
        raise ModelError(
            f"{path}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} are not of rank {size.rank}{stack}"
        )


def _read(folder: Path) -> tuple[PeftSettings, _Tensors]:
    """Return the settings and the tensors as stored. Raises: ModelError."""
    check_version(peft.__version__, "installed is")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        with safe_open(folder / TENSORS_FILE, framework="pt") as file:
            formats = {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise ModelError(f"{folder} is not a readable PEFT adapter: {' '.join(str(error).split())}") from error
    settings = _settings(config, folder)
    for key, stored in formats.items():
        if stored not in _STORED:
            raise ModelError(f"{folder}: tensor {key!r} is stored as {stored}; expected one of {', '.join(_STORED)}")
    tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    try:
        _check_finite(tensors)
    except ModelError as error:
        raise ModelError(f"{folder}: {error}") from None
    return settings, tensors


def _settings(config: object, folder: Path) -> PeftSettings:
    """Return what the configuration says. Raises: ModelError if it is not one of a LoRA that is understood here."""
    where = folder / CONFIG_FILE
    if not isinstance(config, dict) or config.get("peft_type") != "LORA" or not {"r", "lora_alpha"} <= set(config):
        raise ModelError(f"{where}: not the configuration of a LoRA")
    try:
        settings = PeftSettings.parse(config)
    except ModelError as error:
        raise ModelError(f"{where}: {error}") from None
    check_version(settings.peft_version, f"{folder} was written by")
    for option in _OTHER_LORA:
        if config.get(option):
            raise ModelError(f"{where}: {option} is not supported; only plain and rank-stabilised LoRA are")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.startswith(_CHANGES_THE_BASE):
        raise ModelError(f"{where}: init_lora_weights {start!r} changes the base model, which is not supported")
    return settings


def _check_finite(tensors: Mapping[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"tensor {key!r} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}; "
                f"the adapter is damaged, or its numbers are too large"
            )
