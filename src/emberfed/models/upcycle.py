"""Upcycling: from a dense LLaMA or Mistral folder to a checkpoint of the Mixtral architecture.

Mixtral is LLaMA with experts: the same attention, norms and rotary embedding, gated experts, and a router whose K kept
weights are made to sum to 1. So a dense checkpoint needs only its FFNs turned into experts (`ffn_split`) and a router.
What is written is an ordinary Hugging Face checkpoint, named as Mixtral's own are on disk.

Memory: one decoder layer at a time is read, turned, and written as a file of its own. The peak is about that layer's
dense weights and three times its new ones (the tensors, and twice as bytes on their way to disk), whatever the number
of layers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, final

import safetensors.torch
import torch
from huggingface_hub.errors import StrictDataclassError
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig
from transformers.activations import ACT2FN

from emberfed import storage
from emberfed.errors import ConfigError, ModelError, closest
from emberfed.models import ffn_split
from emberfed.models.families import families, load_family
from emberfed.sections import Section
from emberfed.seeds import Seeds

DENSE_TYPES = ("llama", "mistral")
"""Model types whose layers compute what Mixtral's do, but for the experts."""

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NOT_CARRIED = {"architectures", "transformers_version", "intermediate_size"}
_PER_LAYER = ("layer_types", "per_layer_config")
_BESIDE_THE_WEIGHTS = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
_LEFT_OUT = re.compile(r"\.rotary_emb\.inv_freq$")  # of old checkpoints; made from the config now
_TELLING = (OSError, ValueError, RuntimeError, SafetensorError, StrictDataclassError)
"""Errors whose text says what is wrong."""
_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


class UpcycleConfig(Section):
    """How a dense model becomes a sparse one.

    Attributes:
        method: `random` and `clustered` divide the F neurons of an FFN among E experts, F / E each: at random, or by
            balanced k-means on their rows of the gate projection. `copy` makes every expert the whole FFN.
        num_experts: E per layer, up to 65536.
        top_k: K, the experts per token the checkpoint asks for.
        output_scale: Factor folded into the experts' down projections. Router weights sum to 1 over the kept experts,
            while a dense FFN is the sum of its parts: null is `top_k` where neurons are divided (a kept expert's weight
            is then about 1, as in the dense sum) and 1 for `copy`. E instead estimates the dense sum from K parts.
        router_std: Standard deviation of the router's normally distributed weights, up to 1000. With `clustered` its
            rows are the clusters' mean gate rows made as long as such random rows. With 0 all experts look alike to the
            router.
        seed: Of the division and of the router.
    """

    method: Literal["random", "clustered", "copy"] = "random"
    num_experts: int = Field(default=8, ge=2, le=65536)
    top_k: int = Field(default=2, ge=1)
    output_scale: float | None = Field(default=None, gt=0)
    router_std: float = Field(default=0.02, ge=0, le=1000)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k {self.top_k} is more than num_experts {self.num_experts}")
        return self

    @property
    def scale(self) -> float:
        """The factor folded into the down projections."""
        if self.output_scale is not None:
            return self.output_scale
        return 1.0 if self.method == "copy" else float(self.top_k)


@final
@dataclass(frozen=True, slots=True)
class Upcycled:
    """A checkpoint that was written.

    Attributes:
        path: Its folder.
        layers: Decoder layers.
        expert_intermediate: Neurons of one expert.
        dense_parameters: Parameters of the dense model.
        parameters: Parameters of the sparse model.
        active_parameters: Those of them a token uses.
    """

    path: Path
    layers: int
    expert_intermediate: int
    dense_parameters: int
    parameters: int
    active_parameters: int

    def json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return dataclasses.asdict(self) | {"path": str(self.path)}


LayerDone = Callable[[int, int], None]
"""Hears of each finished decoder layer: how many are done, and of how many."""


def upcycle(
    dense: Path, output: Path, options: UpcycleConfig, layer_done: LayerDone = lambda _done, _of: None
) -> Upcycled:
    """Write the sparse checkpoint of a dense one to the folder `output`, which must be absent or empty.

    Number formats are the dense checkpoint's, tensor by tensor. Tokenizer, generation settings and licence are copied;
    `upcycle.json` records the options. The folder appears under its name when all of it is on disk.

    Raises:
        ConfigError: `output` is taken, or the FFN cannot be divided into that many equal experts.
        ModelError: `dense` cannot be read, is not a dense LLaMA or Mistral, uses what Mixtral cannot express, or holds
            weights that are missing, of another shape, quantised or not finite.
        StorageError: Writing failed.
    """
    _check_free(output)
    config = _read_config(dense)
    weights = _Weights.open(dense, _shapes(config, dense), {"lm_head.weight"} if config.tie_word_embeddings else set())
    sparse = sparse_config(config, options)
    with storage.new_folder(output) as filled:
        sizes = _write_weights(weights, filled, options, layer_done)
        storage.write(filled / "config.json", sparse.to_json_string().encode())
        storage.write_json(filled / "upcycle.json", options.model_dump() | {"output_scale": options.scale})
        _copy_files(dense, filled)
    routed = sum(size for name, size in sizes.items() if ".experts." in name)
    parameters = sum(sizes.values())
    return Upcycled(
        path=output,
        layers=config.num_hidden_layers,
        expert_intermediate=sparse.intermediate_size,
        dense_parameters=weights.parameters,
        parameters=parameters,
        active_parameters=parameters - routed * (options.num_experts - options.top_k) // options.num_experts,
    )


def _check_free(output: Path) -> None:
    """Check that a folder may be made at `output`. Raises: ConfigError."""
    try:
        taken = output.is_symlink() or (output.exists() and (not output.is_dir() or any(output.iterdir())))
    except OSError as error:
        raise ConfigError(
            f"{str(output)[:80]!r}... cannot be a folder: {error.strerror}; give another output"
        ) from None
    if "\0" in str(output):
        raise ConfigError(f"{str(output)[:80]!r} cannot be a folder: it has a NUL in it; give another output")
    if taken:
        raise ConfigError(f"{output} exists and is not an empty folder; give another output")


def sparse_config(dense: Any, options: UpcycleConfig) -> MixtralConfig:
    """Return the Mixtral config of a dense LLaMA or Mistral config: every setting the two share is carried over.

    Raises:
        ModelError: The dense model uses a setting that Mixtral does not have.
        ConfigError: The FFN cannot be divided into that many equal experts.
    """
    known = {field.name for field in dataclasses.fields(MixtralConfig)}
    carried: dict[str, Any] = {}
    for field in dataclasses.fields(dense):
        value = getattr(dense, field.name)
        if field.name in known - _NOT_CARRIED:
            carried[field.name] = copy.deepcopy(value)
        elif field.name not in _NOT_CARRIED and value not in (None, field.default):
            raise ModelError(
                f"{field.name} = {value!r} of this {dense.model_type} model cannot be expressed by the Mixtral "
                f"architecture, which computes as with {field.default!r}"
            )
    for name in _PER_LAYER:
        if dense.to_dict().get(name):
            raise ModelError(f"{name} of this {dense.model_type} model cannot be expressed by the Mixtral architecture")
    neurons = dense.intermediate_size
    if options.method != "copy":
        neurons = ffn_split.neurons_per_expert(neurons, options.num_experts)
    try:
        return MixtralConfig(
            **carried,
            architectures=["MixtralForCausalLM"],
            intermediate_size=neurons,
            num_local_experts=options.num_experts,
            num_experts_per_tok=options.top_k,
        )
    except Exception as error:  # whatever transformers makes of settings that do not go together
        raise ModelError(
            f"settings of this {dense.model_type} model do not fit a Mixtral config: {_reason(error)}"
        ) from error


@final
@dataclass(frozen=True, slots=True)
class _Experts:
    """One layer's experts and router: gate_up (E, 2C, D), down (E, D, C), router (E, D)."""

    gate_up: torch.Tensor
    down: torch.Tensor
    router: torch.Tensor

    def named(self, layer: int, scale: float) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors as Mixtral checkpoints name them, each in memory of its own, down projections scaled."""
        block = f"model.layers.{layer}.block_sparse_moe"
        yield f"{block}.gate.weight", self.router.to(self.gate_up.dtype)
        for expert, (gate_up_2CD, down_DC) in enumerate(zip(self.gate_up, self.down, strict=True)):
            gate_CD, up_CD = gate_up_2CD.chunk(2)
            yield f"{block}.experts.{expert}.w1.weight", gate_CD.clone()
            yield f"{block}.experts.{expert}.w3.weight", up_CD.clone()
            scaled_DC = (down_DC.float() * scale).to(down_DC.dtype)
            yield f"{block}.experts.{expert}.w2.weight", scaled_DC.contiguous()


def _experts(
    gate_FD: torch.Tensor, up_FD: torch.Tensor, down_DF: torch.Tensor, options: UpcycleConfig, seeds: Seeds
) -> _Experts:
    """Make one layer's experts; `seeds` are the layer's own."""
    num_experts, (neurons, hidden) = options.num_experts, gate_FD.shape
    router_ED = ffn_split.random_router(num_experts, hidden, options.router_std, seeds.torch("upcycle.router"))
    match options.method:
        case "copy":
            return _Experts(*ffn_split.copy_ffn(gate_FD, up_FD, down_DF, num_experts), router_ED)
        case "random":
            groups_EC = ffn_split.random_groups(neurons, num_experts, seeds.torch("upcycle.groups"))
        case "clustered":
            groups_EC = ffn_split.clustered_groups(gate_FD, num_experts, seeds.torch("upcycle.groups"))
            router_ED = ffn_split.centroid_router(ffn_split.group_means(gate_FD, groups_EC), options.router_std)
    return _Experts(*ffn_split.split_ffn(gate_FD, up_FD, down_DF, groups_EC), router_ED)


@final
@dataclass(frozen=True, slots=True)
class _Weights:
    """The tensors of a checkpoint folder, read when asked for.

    Attributes:
        folder: The checkpoint's.
        files: File of each tensor.
        parameters: Numbers in all of them.
    """

    folder: Path
    files: Mapping[str, Path]
    parameters: int

    @staticmethod
    def open(folder: Path, shapes: Mapping[str, tuple[int, ...]], optional: Set[str]) -> _Weights:
        """Find the tensors and check that they are those of `shapes`; `optional` ones may be absent.

        Raises: ModelError.
        """
        files: dict[str, Path] = {}
        parameters = 0
        for path in _weight_files(folder):
            for name, stored in _stored(path, folder).items():
                if not _LEFT_OUT.search(name):
                    _check_stored(name, stored, shapes, folder)
                    files[name] = path
                    parameters += math.prod(stored.shape)
        missing = sorted(shapes.keys() - files.keys() - optional)
        if missing:
            raise ModelError(
                f"dense model {folder}: {len(missing)} weights are not in the checkpoint, the first is {missing[0]!r}"
            )
        return _Weights(folder, files, parameters)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read a tensor. Raises: ModelError if it cannot be read, or holds values that are not finite."""
        with _reading(self.folder), safe_open(self.files[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"dense model {self.folder}: weight {name!r} holds values that are not finite; it is damaged"
            )
        return tensor


class _Stored(NamedTuple):
    """What a file says of a tensor: its number format by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def _stored(path: Path, folder: Path) -> dict[str, _Stored]:
    """Return what a file holds, by name. Raises: ModelError if it cannot be read."""
    with _reading(folder), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return {name: _Stored(found.get_dtype(), tuple(found.get_shape())) for name, found in slices.items()}


def _check_stored(name: str, stored: _Stored, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> None:
    """Check a stored tensor's name, shape and number format. Raises: ModelError."""
    if name not in shapes:
        raise ModelError(f"dense model {folder}: weight {name!r} has no place in the Mixtral architecture")
    if stored.shape != shapes[name]:
        raise ModelError(
            f"dense model {folder}: weight {name!r} has shape {stored.shape}, its config says {shapes[name]}"
        )
    if stored.dtype not in _DTYPES:
        raise ModelError(
            f"dense model {folder}: weight {name!r} is stored as {stored.dtype}; "
            f"give a checkpoint in {', '.join(str(dtype).removeprefix('torch.') for dtype in _DTYPES.values())}"
        )


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        with _reading(folder):
            found = json.loads(index.read_text(encoding="utf-8"))
        files = found.get("weight_map") if isinstance(found, dict) else None
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise ModelError(
                f"dense model {folder}: {index.name} has no weight_map with the file of each tensor; it is damaged"
            )
        return [folder / name for name in sorted(set(files.values()))]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    raise ModelError(
        f"dense model {folder} has no model.safetensors; open it once with transformers and write it with "
        f"save_pretrained"
    )


def _read_config(folder: Path) -> Any:
    """Read a dense model's config. Raises: ModelError if there is none, or the model is not of a dense type."""
    with _reading(folder):
        there = folder.is_dir()
    if not there:
        raise ModelError(f"dense model folder {folder} does not exist; give the folder of a LLaMA or Mistral model")
    with _reading(folder):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if config.model_type not in DENSE_TYPES:
        sparse = config.model_type in families() and load_family(config.model_type).mixture is not None
        reason = "has experts already" if sparse else "is not supported"
        raise ModelError(
            f"dense model {folder}: model type {config.model_type!r} {reason}; give one of type "
            f"{' or '.join(DENSE_TYPES)}"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"dense model {folder} is quantised; give the checkpoint it was made from")
    if config.hidden_act not in ACT2FN:
        raise ModelError(
            f"dense model {folder}: hidden_act {config.hidden_act!r} is no activation of transformers"
            f"{closest(config.hidden_act, ACT2FN)}"
        )
    return config


def _shapes(config: Any, folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a dense checkpoint, from the model built without memory.

    Raises: ModelError if no model can be built.
    """
    with _reading(folder), torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    return {name: tuple(tensor.shape) for name, tensor in lm.state_dict().items()}


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Turn what libraries raise over files that are not what they should be into one line. Raises: ModelError."""
    try:
        yield
    except Exception as error:
        raise ModelError(f"dense model {str(folder)[:200]} cannot be read: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return one line; what is no plain sentence, as of a KeyError, is named."""
    told = " ".join(str(error).split())[:400]
    return told if told and isinstance(error, _TELLING) else f"{type(error).__name__}: {told}"


def _write_weights(weights: _Weights, folder: Path, options: UpcycleConfig, layer_done: LayerDone) -> dict[str, int]:
    """Write all tensors, a file for what is outside the layers and one per layer; return the size of each tensor."""
    by_layer: dict[int, list[str]] = {}
    for name in weights.files:
        found = _LAYER.match(name)
        by_layer.setdefault(int(found.group(1)) if found else -1, []).append(name)
    sizes: dict[str, int] = {}
    weight_map: dict[str, str] = {}
    stored_bytes = 0
    for number, (layer, names) in enumerate(sorted(by_layer.items()), start=1):
        file = f"model-{number:05}-of-{len(by_layer):05}.safetensors"
        tensors = {name: weights[name] for name in names}
        if layer >= 0:
            tensors = _sparse_layer(tensors, layer, options)
        storage.write(folder / file, safetensors.torch.save(tensors, metadata={"format": "pt"}))
        weight_map |= dict.fromkeys(tensors, file)
        sizes |= {name: tensor.numel() for name, tensor in tensors.items()}
        stored_bytes += sum(tensor.nbytes for tensor in tensors.values())
        layer_done(number - 1, len(by_layer) - 1)
    index = {"metadata": {"total_size": stored_bytes}, "weight_map": weight_map}
    storage.write_json(folder / "model.safetensors.index.json", index)
    return sizes


def _sparse_layer(tensors: Mapping[str, torch.Tensor], layer: int, options: UpcycleConfig) -> dict[str, torch.Tensor]:
    """Return a layer's tensors with experts in place of its FFN. Raises: ModelError if the scale is too much."""
    parts = [f"model.layers.{layer}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    gate_FD, up_FD, down_DF = (tensors[name] for name in parts)
    experts = _experts(gate_FD, up_FD, down_DF, options, Seeds(options.seed).at(layer=layer))
    sparse = dict(experts.named(layer, options.scale))
    broken = next((name for name, tensor in sparse.items() if not bool(torch.isfinite(tensor).all())), None)
    if broken is not None:
        raise ModelError(
            f"weight {broken!r} does not fit into {str(down_DF.dtype).removeprefix('torch.')} times output_scale "
            f"{options.scale:g}; give a smaller one"
        )
    return {name: tensor for name, tensor in tensors.items() if name not in parts} | sparse


def _copy_files(dense: Path, folder: Path) -> None:
    """Copy what a checkpoint has beside its config and weights."""
    for pattern in _BESIDE_THE_WEIGHTS:
        for file in filter(Path.is_file, dense.glob(pattern)):
            with _reading(dense):
                data = file.read_bytes()
            storage.write(folder / file.name, data)
