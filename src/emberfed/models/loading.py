"""From `model` in the configuration to a `FoundationModel` and its tokenizer."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from emberfed import builtin
from emberfed.errors import ModelError
from emberfed.models.config import ModelConfig
from emberfed.models.families import Family, family_of
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.quantised import Bits
from emberfed.models.quantised_loading import ExpertQuantisation


def load(config: ModelConfig) -> tuple[FoundationModel, PreTrainedTokenizerBase]:
    """Load the model, frozen, and its tokenizer. A local folder is read without any network.

    With `expert_bits` the experts are quantised as they are read. Beside what is in memory already, loading needs about
    twice the largest fused weight of one layer in `dtype`, and the checkpoint's files mapped, pages of which the system
    drops when memory runs short.

    Raises: ModelError if either cannot be found or read, if weights are missing or not finite, if the model is of no
        known family, or has no experts that can be quantised.
    """
    path = model_path(config)
    device = _device(config.device)
    if config.revision is not None and Path(path).is_dir():
        raise ModelError(f"model.revision {config.revision!r} is of hub ids only, and model.path {path} is a folder")
    with _reading(path, "model"), _quietly():
        where: dict[str, Any] = {
            "local_files_only": Path(path).is_dir(),
            "revision": config.revision,
            "trust_remote_code": False,
        }
        found = AutoConfig.from_pretrained(path, **where)  # before gigabytes of weights are read
        family = family_of(found)
        _check_stored_formats(Path(path), found)
        if config.expert_bits is not None:
            where["quantization_config"] = _quantisation(found, family, config.expert_bits)
        lm, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=config.dtype, output_loading_info=True, ignore_mismatched_sizes=True, **where
        )
        _check_whole(info)
        _check_finite(lm)
    _let_go_of_files(lm)
    _return_freed_memory()
    # A checkpoint's own penalties and beams would change greedy answers without anybody seeing why.
    lm.generation_config = GenerationConfig()
    return FoundationModel(lm.to(device)), load_tokenizer(config)


_UNDERSTOOD_QUANTISATION = "mxfp4"
"""GPT-OSS comes so, and transformers restores it exactly; the other formats it restores wrongly or not at all here."""

_FLOATS = ("F64", "F32", "F16", "BF16")


def _check_stored_formats(path: Path, found: Any) -> None:
    """Check, where the files are at hand, that weights are stored as plain numbers, or in the one understood way.

    transformers would cast codes to numbers without a word.
    """
    settings = getattr(found, "quantization_config", None)
    if settings is not None:
        method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
        if method != _UNDERSTOOD_QUANTISATION:
            raise ModelError(
                f"its checkpoint is quantised ({method or settings}); give one in 16 or 32 bits, and set "
                f"model.expert_bits to hold its experts in fewer"
            )
        return
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else ():
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                stored = tensors.get_slice(name).get_dtype()
                if stored not in _FLOATS:
                    raise ModelError(
                        f"weight {name!r} is stored as {stored}, but config.json says of no quantisation; expected "
                        f"{', '.join(_FLOATS)}"
                    )


def _check_whole(info: Mapping[str, Any]) -> None:
    """Check what transformers says of loading: every weight found, none left over, none of another shape."""
    for key, what in (
        ("missing_keys", "weights are not in the checkpoint"),
        ("unexpected_keys", "tensors of the checkpoint have no place in the model its config.json describes"),
        ("mismatched_keys", "weights have another shape than config.json says"),
        ("conversion_errors", "weights could not be put together from the checkpoint's"),
    ):
        found = info.get(key) or ()
        names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in found)
        if names:
            raise ModelError(f"{len(names)} {what}, the first is {names[0]!r}; the checkpoint is damaged or incomplete")


def _check_finite(lm: nn.Module) -> None:
    for name, tensor in (*lm.named_parameters(), *lm.named_buffers()):
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"weight {name!r} holds values that are not finite in {str(tensor.dtype).removeprefix('torch.')}; the "
                f"checkpoint is damaged, or its numbers are too large for this model.dtype"
            )


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """Let torch compute with that many CPU threads inside the context; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if number is None else number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load only the tokenizer. Raises: ModelError if it cannot be found or read."""
    path = model_path(config) if config.tokenizer is None else config.tokenizer
    revision = config.revision if config.tokenizer is None else None
    with _reading(path, "tokenizer"), _quietly():
        tokenizer = _tokenizer(path, local_files_only=Path(path).is_dir(), revision=revision)
    if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes of a folder without tokenizer files
        raise ModelError(f"tokenizer {path} has no tokens; give a folder with tokenizer.json, or set model.tokenizer")
    return tokenizer


def _tokenizer(path: str, **where: Any) -> PreTrainedTokenizerBase:
    # Code that comes with a checkpoint is never run, nor is the user asked to let it.
    try:
        named: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **where)
    except ValueError:  # a class of its own that transformers does not know: the file alone may say enough
        if not (Path(path) / "tokenizer.json").is_file():
            raise
        plain: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(path, **where)
        return plain
    return named


def model_path(config: ModelConfig) -> str:
    """Return where the model is read from, `builtin` resolved to its folder in the package."""
    if config.path != "builtin":
        return config.path
    return str(builtin.model_path())


def _quantisation(found: Any, family: Family, bits: Bits) -> ExpertQuantisation:
    if family.mixture is None:
        raise ModelError(
            f"model.expert_bits is {bits}, but {family.model_type} models are dense and have no experts; set "
            f"model.expert_bits=null"
        )
    if getattr(found, "quantization_config", None) is not None:
        raise ModelError("its checkpoint is quantised already, and cannot be once more; set model.expert_bits=null")
    return ExpertQuantisation(bits)


def _let_go_of_files(lm: nn.Module) -> None:
    """Copy the weights that still lie in the checkpoint's files, which transformers maps into memory.

    One such weight keeps the whole of its file mapped, and counted as memory of this process, beside the experts that
    were made from it.
    """
    for parameter in lm.parameters():
        if not parameter.untyped_storage().resizable():  # not memory of torch's own
            parameter.data = parameter.data.clone()


def _return_freed_memory() -> None:
    """Give the system back what loading freed; else glibc keeps up to half as much again as a model needs."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device is 'cuda' but torch finds no CUDA device here; set model.device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def _reading(path: str, what: str) -> Iterator[None]:
    """Turn what transformers raises for a folder or hub id it cannot read into one line; say where others come from."""
    if len(path) > 4096:
        raise ModelError(
            f"{what} path of {len(path)} characters is too long; give a local folder, a hub id or 'builtin'"
        )
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1 or Path(path).exists()):
        raise ModelError(f"{what} folder {path} does not exist; give a local folder, a hub id or 'builtin'")
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{what} {path}: {error}") from None
    except Exception as error:  # whatever libraries raise over files that are not what they should be
        missing = "" if Path(path).is_dir() else f"there is no folder {path} here, and as a hub id it "
        raise ModelError(
            f"{what} {path} cannot be loaded: {missing}{'failed: ' if missing else ''}{_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Return one line; libraries write pages, and some say nothing but a name."""
    told = " ".join(str(error).split())
    if "automatic conversion" in told:  # the report it names is among the warnings that were silenced
        return "the weights of some layer's experts do not go together; one has another shape, or is damaged"
    if len(told) > 400:
        told = f"{told[:400]}..."
    plain = isinstance(error, OSError | RuntimeError) or (isinstance(error, ValueError) and told)
    return told if plain and told else f"{type(error).__name__}: {told}"


@contextmanager
def _quietly() -> Iterator[None]:
    """Silence the progress bars and warnings of loading, then restore the libraries' settings."""
    log: Any = transformers.utils.logging
    hub_log: Any = huggingface_hub.utils.logging
    verbosity, hub_verbosity, bars = log.get_verbosity(), hub_log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    hub_log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        hub_log.set_verbosity(hub_verbosity)
        if bars:
            log.enable_progress_bar()
