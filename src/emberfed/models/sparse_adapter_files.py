"""A sparse adapter as a folder of its own: its settings in JSON, its tensors in safetensors, under the names PEFT uses.

adapter = emberfed.load_adapter(model, "runs/mine/final")     # model: any transformers model of a known family
model.generate(...)
adapter.remove()
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, Self, final

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError

from emberfed import storage
from emberfed.errors import ConfigError, ModelError
from emberfed.models import head as heads
from emberfed.models.adapter_layer import Activation
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora_layout import layer_of
from emberfed.models.peft_layout import CONFIG_FILE, TENSORS_FILE
from emberfed.models.sparse_adapter import SparseAdapter, attached_at
from emberfed.models.sparse_adapter_layout import Site, check, check_top_k, num_experts
from emberfed.sections import Section, validate

FORMAT = "emberfed-sparse-adapter"
VERSION = 1


class AdapterSettings(Section):
    """What the folder says of the adapter.

    Attributes:
        format: What the folder is.
        version: Of the format.
        model_type: transformers' name of the model type it was made for.
        base_model: The base model's name or folder, as far as it was known.
        hidden_size: D.
        num_experts: M.
        expert_size: H; 0 if there is no layer, as with a head alone.
        activation: What is between an expert's two matrices.
        layers: The layers it stands in.
        head: Whether it has a classifier's head.
        classes: Names of its classes in the order of their numbers; empty without a head.
        top_k: K where nothing else is asked for.
    """

    format: Literal["emberfed-sparse-adapter"]
    version: Literal[1]
    model_type: str
    base_model: str
    hidden_size: int = Field(ge=1)
    num_experts: int = Field(ge=1)
    expert_size: int = Field(ge=0)
    activation: Activation
    layers: tuple[int, ...]
    head: bool
    classes: tuple[str, ...] = ()
    top_k: int = Field(ge=1)


def to_files(
    tensors: Mapping[str, torch.Tensor], model: FoundationModel, activation: Activation, top_k: int
) -> dict[str, bytes]:
    """Return the folder's two files by name; the same adapter always gives the same bytes.

    Args:
        tensors: The adapter; written as float32.
        model: The model it belongs to.
        activation: What is between an expert's two matrices.
        top_k: K where nothing else is asked for.

    Raises: ModelError if the adapter does not fit the model; ConfigError if K is not from 1 to M.
    """
    check(model, tensors)
    check_top_k(top_k, tensors)
    settings = AdapterSettings(
        format=FORMAT,
        version=VERSION,
        model_type=model.family.model_type,
        base_model=model.lm.name_or_path,
        hidden_size=model.shape.hidden,
        activation=activation,
        top_k=top_k,
        classes=_classes(model) if any(map(heads.is_head, tensors)) else (),
        **_facts(tensors),
    )
    stored = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in sorted(tensors.items())}
    return {
        CONFIG_FILE: storage.encoded(settings.model_dump()),
        TENSORS_FILE: safetensors.torch.save(stored, {"format": "pt"}),
    }


def save_adapter(
    path: str | Path, tensors: Mapping[str, torch.Tensor], model: FoundationModel, activation: Activation, top_k: int
) -> None:
    """Write the adapter to a folder, absent or empty. Raises: as `to_files`; StorageError."""
    files = to_files(tensors, model, activation, top_k)
    with storage.new_folder(Path(path)) as folder:
        for name, data in files.items():
            storage.write(folder / name, data)


def is_ours(config: bytes) -> bool:
    """Return whether the bytes of an adapter's settings are of this format. Raises: ValueError if they are not JSON."""
    values = json.loads(config)
    return isinstance(values, dict) and values.get("format") == FORMAT


def read_adapter(path: str | Path) -> tuple[AdapterSettings, dict[str, torch.Tensor]]:
    """Return what is in a folder. Raises: ModelError if it is not one of ours, is damaged, or contradicts itself."""
    folder = Path(path)
    settings = _settings(folder / CONFIG_FILE)
    file = folder / TENSORS_FILE
    try:
        tensors = safetensors.torch.load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read ({' '.join(str(error).split())}); copy the whole folder") from None
    for name, tensor in sorted(tensors.items()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"{file}: {name!r} holds values that are not finite; the adapter is damaged")
    facts = _facts(tensors)
    for key, found in facts.items():
        if getattr(settings, key) != found:
            raise ModelError(
                f"{folder}: {CONFIG_FILE} says {key} {getattr(settings, key)}, but the tensors say {found}; the two "
                f"files are not of one adapter"
            )
    return settings, tensors


@final
class LoadedAdapter:
    """An adapter that a model computes with until it is removed; also a context manager, which removes it.

    Attributes:
        settings: What the folder says of it.
    """

    def __init__(self, adapter: SparseAdapter, settings: AdapterSettings, attachment: ExitStack) -> None:
        """Hold an adapter that is attached, and what takes it off."""
        self.settings = settings
        self._adapter = adapter
        self._attachment = attachment

    @property
    def top_k(self) -> int:
        """Experts active per token."""
        return self._adapter.top_k

    def remove(self) -> None:
        """Leave the model exactly as it was before; a second time does nothing."""
        self._attachment.close()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove it."""
        self.remove()


def load_adapter(model: Any, path: str | Path, top_k: int | None = None) -> LoadedAdapter:
    """Let a model compute with the sparse adapter of a folder, until it is removed.

    Args:
        model: A transformers model of a known family, or a `FoundationModel`.
        path: The folder, as `save_adapter` or a run writes it.
        top_k: K, from 1 to M; None is the folder's own.

    Returns:
        The attached adapter: `remove()` it, or use it as a context manager. The model keeps it as `emberfed_adapter`.
        While it is there, the config of a model with its head has the names of its classes.

    Raises:
        ModelError: if the folder is not a sparse adapter, does not fit the model, or the model has one already.
        ConfigError: if K is not from 1 to M.
    """
    settings, tensors = read_adapter(path)
    with ExitStack() as stack:
        is_ours = isinstance(model, FoundationModel)
        site = Site.of(model) if is_ours else stack.enter_context(Site.of_transformers(model))
        for what, wanted, found in (
            ("model type", settings.model_type, site.family.model_type),
            ("hidden size", settings.hidden_size, site.hidden),
        ):
            if wanted != found:
                raise ModelError(
                    f"the adapter in {path} was made for {what} {wanted}, but this model's is {found}; load "
                    f"{settings.base_model or 'the model it was made for'}"
                )
        _check_head(settings, site, path)
        chosen = settings.top_k if top_k is None else top_k
        adapter = stack.enter_context(attached_at(site, tensors, chosen, settings.activation))
        for parameter in adapter.parameters.values():
            parameter.requires_grad_(False)
        lm = model.lm if is_ours else model
        stack.enter_context(_named_classes(lm, settings.classes))
        stack.callback(vars(lm).pop, _KEPT, None)
        loaded = LoadedAdapter(adapter, settings, stack.pop_all())
        vars(lm)[_KEPT] = loaded  # who lets go of it does not mean to take the adapter off
        return loaded


_KEPT = "emberfed_adapter"


@contextmanager
def _named_classes(lm: Any, classes: Sequence[str]) -> Iterator[None]:
    """Let the model's config name the adapter's classes inside the context, where it has a head for them."""
    if not classes:
        yield
        return
    before = lm.config.id2label, lm.config.label2id
    lm.config.id2label = dict(enumerate(classes))
    lm.config.label2id = {name: number for number, name in enumerate(classes)}
    try:
        yield
    finally:
        lm.config.id2label, lm.config.label2id = before


def _classes(model: FoundationModel) -> tuple[str, ...]:
    names = model.lm.config.id2label
    return tuple(str(names[number]) for number in sorted(names))


def _check_head(settings: AdapterSettings, site: Site, path: str | Path) -> None:
    """Check that the model tells apart as many classes as the adapter's head. Raises: ModelError."""
    found = None if site.head is None else [*site.head.parameters()][-1].shape[0]
    if settings.classes and found is not None and found != len(settings.classes):
        raise ModelError(
            f"the adapter in {path} has a head for {len(settings.classes)} classes, but this model's is for {found}; "
            f"load the model with num_labels={len(settings.classes)}"
        )


def _facts(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return what the tensors themselves say."""
    inner = [name for name in tensors if not heads.is_head(name)]
    down = next((tensor for name, tensor in sorted(tensors.items()) if name.endswith("experts.down_proj")), None)
    return {
        "num_experts": num_experts(tensors),
        "expert_size": 0 if down is None else down.shape[1],
        "layers": tuple(sorted({layer_of(name) for name in inner})),
        "head": len(inner) < len(tensors),
    }


def _settings(file: Path) -> AdapterSettings:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{file.parent} has no {file.name}, so it is not the folder of an adapter") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read ({' '.join(str(error).split())}); copy the whole folder") from None
    if isinstance(values, dict) and "peft_type" in values:
        raise ModelError(f"{file.parent} is an adapter of PEFT, not a sparse adapter; open it with peft.PeftModel")
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ModelError(f"{file} is not of a sparse adapter: its 'format' is not {FORMAT!r}")
    if values.get("version") != VERSION:
        raise ModelError(
            f"{file} is of version {values.get('version')!r} of its format, but only version {VERSION} is known; use "
            f"the emberfed that wrote it"
        )
    try:
        return validate(AdapterSettings, values, "")
    except ConfigError as error:
        raise ModelError(f"{file}: {error}") from None
