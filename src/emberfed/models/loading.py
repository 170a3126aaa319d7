"""From `model` in the configuration to a `FoundationModel`, and to its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from emberfed import builtin
from emberfed.errors import ModelError, StorageError
from emberfed.models.arrival import ExpertArrival, InBits, Keeping, OnDisk
from emberfed.models.config import ModelConfig
from emberfed.models.families import Family, Task, families, family_of, load_family
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.freed_memory import return_freed_memory
from emberfed.models.stacked import check_finite

_SEED = 0
"""Of weights that no checkpoint has: the same base model wherever it is loaded."""

_CLASSES: Mapping[Task, Any] = {
    "generation": AutoModelForCausalLM,
    "text_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}


def load(config: ModelConfig) -> tuple[FoundationModel, PreTrainedTokenizerBase]:
    """Load a model that generates, frozen, and its tokenizer. Raises: as `load_model` and `load_tokenizer`."""
    return load_model(config), load_tokenizer(config)


def load_model(config: ModelConfig, classes: Sequence[str] | None = None, task: Task | None = None) -> FoundationModel:
    """Load a model, frozen. A local folder is read without any network.

    A classifier keeps its checkpoint's head if that tells apart these classes, by name and in this order. Otherwise the
    head, and what a checkpoint of pretraining lacks in front of it, is drawn by transformers' own initialisation from a
    seed that is always the same: one checkpoint and one number of classes give one base model.

    With `expert_bits` the experts are quantised as they are read, with `expert_storage: disk` written to files. Beside
    what is in memory already, loading needs about four times the largest fused weight of one layer in `dtype` (its
    pieces, their halves, the whole, and what was freed last), and the checkpoint's files mapped, pages of which the
    system drops when memory runs short.

    Args:
        config: Which model, and how to hold it.
        classes: Names of the classes in the order of their numbers, for a classifier; None for a model that generates.
        task: What the model is to do; None is generation without `classes`, and with them whichever kind of classifier
            the model is (the built-in one tells images apart).

    Raises: ModelError if it cannot be found or read, if weights are missing or not finite, if the model is of no known
        family or of one for another task, or has no experts that can be quantised or kept on disk; StorageError if
        experts cannot be written to disk.
    """
    path = model_path(config, task or ("generation" if classes is None else "image_classification"))
    device = _device(config.device)
    if config.revision is not None and Path(path).is_dir():
        raise ModelError(f"model.revision {config.revision!r} is of hub ids only, and model.path {path} is a folder")
    with _reading(path, "model"), _quietly(), torch.random.fork_rng(devices=[]):
        where = _where(config, path)
        found = AutoConfig.from_pretrained(path, **where)  # before gigabytes of weights are read
        family = family_of(found)
        _check_task(family, classes, task)
        known = [found.id2label[number] for number in sorted(found.id2label)] if found.id2label else []
        if classes is not None:
            found.id2label, found.label2id = _numbered(classes)
        _choose_class(found, family.task)
        keeping = _keeping(config, found, family)
        if config.weights == "random":
            lm = _drawn(config, found, family)
        else:
            _check_stored_formats(Path(path), found)
            if keeping is not None:
                where["quantization_config"] = ExpertArrival(keeping)
            lm, info = _CLASSES[family.task].from_pretrained(
                path,
                config=found,
                dtype=config.dtype,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **where,
            )
            fresh = _fresh_parts(family, info, keeps_head=classes is None or list(classes) == known)
            _check_whole(info, family, fresh)
            for part in fresh:
                _draw_again(lm, part)
        for name, tensor in (*lm.named_parameters(), *lm.named_buffers()):
            check_finite(f"weight {name!r}", tensor)
    _let_go_of_files(lm)
    return_freed_memory()
    if lm.can_generate():
        # A checkpoint's own penalties and beams would change greedy answers without anybody seeing why.
        lm.generation_config = GenerationConfig()
    return FoundationModel(lm.to(device))


def check_family(config: ModelConfig, task: Task) -> None:
    """Check, from its config alone, that a model is of a known family for the task. Raises: ModelError."""
    path = model_path(config, task)
    with _reading(path, "model"), _quietly():
        _check_family_task(family_of(AutoConfig.from_pretrained(path, **_where(config, path))), task)


def _where(config: ModelConfig, path: str) -> dict[str, Any]:
    """Return how transformers is to look for a model."""
    return {"local_files_only": Path(path).is_dir(), "revision": config.revision, "trust_remote_code": False}


def _check_family_task(family: Family, task: Task) -> None:
    if task != family.task:
        others = ", ".join(name for name in families() if load_family(name).task == task)
        raise ModelError(
            f"{family.model_type} models are for {family.task.replace('_', ' ')}, but data.task is {task!r}; set "
            f"data.task={family.task}, or choose a model of another family (for {task}: {others})"
        )


def _check_task(family: Family, classes: Sequence[str] | None, task: Task | None) -> None:
    """Check that the family is for the task, and is given classes if that needs them. Raises: ModelError."""
    words = family.task.replace("_", " ")
    if task is not None:
        _check_family_task(family, task)
    if classes is None and family.head is not None:
        raise ModelError(f"{family.model_type} models are for {words} and need the names of classes; none were given")
    if classes is not None and family.head is None:
        raise ModelError(
            f"{family.model_type} models are for {words}, but classes are to be told apart "
            f"({', '.join(classes[:3])}, ...); choose a classifier, or set data.task=generation"
        )
    if classes is not None and (len(classes) < 2 or len(set(classes)) != len(classes)):
        raise ModelError(f"a classifier needs two or more classes of different names, found {list(classes)}")


def _numbered(classes: Sequence[str]) -> tuple[dict[int, str], dict[str, int]]:
    return dict(enumerate(classes)), {name: number for number, name in enumerate(classes)}


def _choose_class(found: Any, task: Task) -> None:
    """Say which class the model is of where a family has several (DeiT's other one has two heads that are averaged)."""
    candidates = _CLASSES[task]._model_mapping[type(found)]
    if isinstance(candidates, tuple):
        found.architectures = [candidates[0].__name__]


def _drawn(config: ModelConfig, found: Any, family: Family) -> Any:
    """Return a model of random weights."""
    dtype = found.dtype or torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    torch.manual_seed(_SEED)
    return _CLASSES[family.task].from_config(found, dtype=dtype).eval()


def _fresh_parts(family: Family, info: Mapping[str, Any], keeps_head: bool) -> tuple[str, ...]:
    """Return the paths of what the checkpoint lacks and may lack, in part or whole, or has for other classes."""
    lacking = {*_names_of(info, "missing_keys"), *_names_of(info, "mismatched_keys")}
    may_lack = [path for path in (family.head, family.fresh) if path is not None]
    return tuple(
        path
        for path in may_lack
        if (path == family.head and not keeps_head) or any(name.startswith(f"{path}.") for name in lacking)
    )


def _draw_again(lm: Any, path: str) -> None:
    """Draw a part's weights anew, by transformers' own initialisation, whatever else the checkpoint lacked."""
    module = lm.get_submodule(path)
    for parameter in module.parameters():
        parameter._is_hf_initialized = False
    torch.manual_seed(_SEED)
    for _, child in sorted(module.named_modules()):
        lm._init_weights(child)


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


def _names_of(info: Mapping[str, Any], kind: str) -> list[str]:
    """Return the names of one kind of what transformers says of loading, sorted."""
    return sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in info.get(kind) or ())


def _check_whole(info: Mapping[str, Any], family: Family, fresh: Sequence[str]) -> None:
    """Check what transformers says of loading: every weight found, none left over, none of another shape.

    Parts that are drawn may be missing. A classifier's checkpoint may hold what it was pretrained with, but no layer
    that config.json does not tell of.
    """
    for kind, what in (
        ("missing_keys", "weights are not in the checkpoint"),
        ("unexpected_keys", "tensors of the checkpoint have no place in the model its config.json describes"),
        ("mismatched_keys", "weights have another shape than config.json says"),
        ("conversion_errors", "weights could not be put together from the checkpoint's"),
    ):
        names = [name for name in _names_of(info, kind) if not name.startswith(tuple(f"{part}." for part in fresh))]
        if kind == "unexpected_keys" and family.head is not None:
            within = family.layers.partition(".")[2]  # as a checkpoint of the transformer alone names them
            names = [name for name in names if name.startswith((f"{family.layers}.", f"{within}."))]
        if names:
            raise ModelError(f"{len(names)} {what}, the first is {names[0]!r}; the checkpoint is damaged or incomplete")


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


def model_path(config: ModelConfig, task: Task = "generation") -> str:
    """Return where the model is read from, `builtin` resolved to the folder in the package of that task's model.

    Raises: ModelError if no model for the task comes with the package.
    """
    if config.path != "builtin":
        return config.path
    if task == "text_classification":
        raise ModelError(
            "model.path is 'builtin', but no model for text classification comes with the package; give the folder or "
            "hub id of one, such as a BERT or RoBERTa"
        )
    return str(builtin.model_path() if task == "generation" else builtin.vision_model_path())


def _keeping(config: ModelConfig, found: Any, family: Family) -> Keeping | None:
    """Return how experts are to be kept; None for parameters. Raises: ModelError if this model's cannot be."""
    keeping: Keeping
    if config.expert_bits is not None:
        keeping, asked, instead = InBits(config.expert_bits), f"expert_bits is {config.expert_bits}", "expert_bits=null"
    elif config.expert_storage == "disk":
        keeping, asked, instead = OnDisk(), "expert_storage is disk", "expert_storage=memory"
    else:
        return None
    if family.mixture is None:
        raise ModelError(
            f"model.{asked}, but {family.model_type} models are dense and have no experts; set model.{instead}"
        )
    if config.weights == "random":
        raise ModelError(
            f"model.{asked}, but only a checkpoint's weights can be kept so; set model.weights=checkpoint, or "
            f"model.{instead}"
        )
    if getattr(found, "quantization_config", None) is not None:
        raise ModelError(f"its checkpoint is quantised already, but model.{asked}; set model.{instead}")
    return keeping


def _let_go_of_files(lm: nn.Module) -> None:
    """Copy the weights that still lie in the checkpoint's files, which transformers maps into memory.

    One such weight keeps the whole of its file mapped, and counted as memory of this process, beside the experts that
    were made from it.
    """
    for parameter in lm.parameters():
        if not parameter.untyped_storage().resizable():  # not memory of torch's own
            parameter.data = parameter.data.clone()


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
    except (ModelError, StorageError) as error:
        raise type(error)(f"{what} {path}: {error}") from None
    except Exception as error:  # whatever libraries raise over files that are not what they should be
        missing = "" if Path(path).is_dir() else f"there is no folder {path} here, and as a hub id it "
        raise ModelError(
            f"{what} {path} cannot be loaded: {missing}{'failed: ' if missing else ''}{_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    """Return one line; libraries write pages, and some say nothing but a name."""
    told = " ".join(str(error).split())
    if "automatic conversion" in told:  # the report it names is among the warnings that were silenced
        return (
            "the weights of some layer's experts do not go together; one has another shape, or is damaged, or memory "
            "ran short"
        )
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
