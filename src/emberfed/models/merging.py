"""What was trained written into the base's own weights, and the result as an ordinary Hugging Face checkpoint.

W becomes W + alpha / R * B A for attention, experts and MLPs; a trained router, head or expert takes the place of the
base's.
Sums are float32, one matrix of one expert at a time, and are rounded once to the type the base is loaded in. A bfloat16
weight has 8 significant bits, so an update below 1/512 of it can vanish: merge into a float32 base to lose nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D

from emberfed.errors import ModelError, StorageError
from emberfed.models import tuning_layout
from emberfed.models.expert_layer import matrix_of
from emberfed.models.expert_weights import ExpertWeights
from emberfed.models.foundation_model import FoundationModel, SparseBlock
from emberfed.models.head import head_parameters
from emberfed.models.lora_layout import check, linears, router_weight
from emberfed.models.offloaded import is_offloaded
from emberfed.models.quantised import QuantisedWeight
from emberfed.models.routed_lora import MATRICES
from emberfed.models.tuning_layout import Rows


class Saveable(Protocol):
    """What transformers writes beside a model: a tokenizer, the processing of images."""

    def save_pretrained(self, save_directory: str) -> object:
        """Write its files to a folder."""
        ...


@torch.no_grad()
def merge_into(model: FoundationModel, tensors: Mapping[str, torch.Tensor], alpha: float) -> None:
    """Add an adapter to the model's own weights. The model is changed for good: load one for this.

    Args:
        model: In 16 or 32 bits.
        tensors: By canonical name (see `lora_layout`).
        alpha: The scale is alpha / R.

    Raises: ModelError if the adapter does not fit, or the base is quantised.
    """
    check(model, tensors)
    check_mergeable(model)
    check_whole_weights(tensors)
    on_device = {name: tensor.to(model.device, torch.float32) for name, tensor in tensors.items()}
    for path, (module, attribute) in linears(model).items():
        if f"{path}.lora_A" in on_device:
            a, b = on_device[f"{path}.lora_A"], on_device[f"{path}.lora_B"]
            linear = getattr(module, attribute)
            stored = linear.weight.detach()
            _add(stored.t() if isinstance(linear, Conv1D) else stored, b @ a, alpha / a.shape[0])
    for block in model.blocks:
        _merge_experts(block, on_device, alpha)
        router = on_device.get(f"layers.{block.layer}.router.weight")
        if router is not None:
            router_weight(block.router).detach().copy_(router)
    for name, parameter in head_parameters(model).items():
        if name in on_device:
            parameter.detach().copy_(on_device[name])


@torch.no_grad()
def replace_experts(model: FoundationModel, tensors: Mapping[str, torch.Tensor], rows: Rows) -> None:
    """Put experts that were trained in full in the place of the model's, rounded once, if at all. It is for good.

    Args:
        model: In 16 or 32 bits.
        tensors: Stacks `layers.{l}.experts.{matrix}.weight`, (n, out, in).
        rows: Which experts they hold.

    Raises: ModelError if they do not fit or hold LoRA, or the base is quantised or on disk.
    """
    tuning_layout.check(model, tensors, rows)
    check_mergeable(model)
    lora = next((name for name in tensors if not tuning_layout.is_full(name)), None)
    if lora is not None:
        raise ModelError(f"{lora!r} is LoRA, which takes the place of no weights; merge it instead")
    for block in model.blocks:
        weights = _own(block)
        for place, expert in enumerate(rows.get(block.layer, ())):
            for matrix in MATRICES:
                stack = tensors.get(f"layers.{block.layer}.experts.{matrix}{tuning_layout.WEIGHT}")
                if stack is not None:
                    matrix_of(weights, expert, matrix).copy_(stack[place].t())


@contextmanager
def merged(model: FoundationModel, tensors: Mapping[str, torch.Tensor], alpha: float) -> Iterator[None]:
    """Run the model with an adapter added to its weights inside the context; on exit they have their bits again.

    Needs a copy of every weight the adapter touches, besides the model.

    Raises: as `merge_into`.
    """
    check(model, tensors)
    saved = [(weight, weight.detach().clone()) for weight in _touched(model, tensors)]
    try:
        merge_into(model, tensors, alpha)
        yield
    finally:
        for weight, before in saved:
            weight.detach().copy_(before)


def _touched(model: FoundationModel, tensors: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the weights that `merge_into` would write to."""
    check_mergeable(model)
    for path, (module, attribute) in linears(model).items():
        if f"{path}.lora_A" in tensors:
            yield getattr(module, attribute).weight
    for block in model.blocks:
        experts: Any = block.experts
        path = f"layers.{block.layer}.experts"
        if any(f"{path}.{matrix}.lora_A" in tensors for matrix in ("gate_proj", "up_proj")):
            yield experts.gate_up_proj
        if f"{path}.down_proj.lora_A" in tensors:
            yield experts.down_proj
        if f"layers.{block.layer}.router.weight" in tensors:
            yield router_weight(block.router)
    yield from (parameter for name, parameter in head_parameters(model).items() if name in tensors)


def check_mergeable(model: FoundationModel) -> None:
    """Check that weights can be added to. Raises: ModelError if they are quantised, or on disk."""
    if any(isinstance(module, QuantisedWeight) for module in model.lm.modules()):
        raise ModelError("a quantised base cannot be merged with; load the base unquantised (model.expert_bits=null)")
    if is_offloaded(model.lm):
        raise ModelError(
            "a base whose experts are on disk cannot be merged with; load it into memory (model.expert_storage=memory)"
        )


def check_whole_weights(tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that nothing in an adapter is lost without a place in the base's weights. Raises: ModelError."""
    rescalers = sorted(name for name in tensors if name.endswith(".rescaler"))
    if rescalers:
        raise ModelError(
            f"{rescalers[0]!r} multiplies what experts give, which no weight of the base does; leave the rescalers out"
        )


def write_checkpoint(model: FoundationModel, processor: Saveable | None, folder: Path) -> None:
    """Write config.json, weights (safetensors) and what makes inputs, for transformers' `from_pretrained`.

    Args:
        model: The model.
        processor: Its tokenizer, or its processing of images; None writes none.
        folder: Where to.

    Raises: StorageError.
    """
    if model.lm.can_generate():
        # Loading forgets the checkpoint's generation defaults; without them the model would not know where to stop.
        model.lm.generation_config = _generation_config(model)
    # A base restored from fewer bits would be written as the pieces it was read from, without being in their format.
    model.lm._weight_conversions = get_model_conversion_mapping(model.lm)
    model.lm.config.__dict__.pop("quantization_config", None)
    try:
        with _without_bars():
            model.lm.save_pretrained(folder)
            if processor is not None:
                processor.save_pretrained(str(folder))
        for weights in folder.glob(
            "*.safetensors"
        ):  # written for their owner alone; the other files' mode is the user's
            weights.chmod((folder / "config.json").stat().st_mode)
    except (OSError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise StorageError(f"could not write {folder}: {reason}; make room or allow writing, then repeat") from error


def _own(block: SparseBlock) -> ExpertWeights:
    """Return a block's experts in their own type, which are views on what the model has."""
    experts: Any = block.experts
    return ExpertWeights(experts, experts.gate_up_proj.dtype)


def _merge_experts(block: SparseBlock, tensors: Mapping[str, torch.Tensor], alpha: float) -> None:
    weights = _own(block)
    for matrix in MATRICES:
        path = f"layers.{block.layer}.experts.{matrix}"
        if f"{path}.lora_A" not in tensors:
            continue
        a_ERI, b_EOR = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
        for expert, (a, b) in enumerate(zip(a_ERI, b_EOR, strict=True)):
            _add(matrix_of(weights, expert, matrix).t(), b @ a, alpha / a.shape[0])


def _add(weight: torch.Tensor, delta: torch.Tensor, scale: float) -> None:
    weight.copy_(delta.mul_(scale).add_(weight))


def _generation_config(model: FoundationModel) -> GenerationConfig:
    path = model.lm.name_or_path
    try:
        found: GenerationConfig = GenerationConfig.from_pretrained(path, local_files_only=Path(path).is_dir())
    except OSError:  # the checkpoint has none
        return GenerationConfig.from_model_config(model.lm.config)
    return found


@contextmanager
def _without_bars() -> Iterator[None]:
    log: Any = transformers.utils.logging
    shown = log.is_progress_bar_enabled()
    log.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            log.enable_progress_bar()
