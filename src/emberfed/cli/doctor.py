"""What this machine offers and what will bite: one check, one line. Nothing here needs a network."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import psutil
import torch
from transformers import PreTrainedTokenizerBase

import emberfed
from emberfed.builtin import corpus
from emberfed.config import RunConfig
from emberfed.errors import EmberfedError
from emberfed.models.footprint import ModuleMemory, memory_by_module, total
from emberfed.models.foundation_model import FoundationModel
from emberfed.provenance import versions
from emberfed.report import numbers
from emberfed.seeds import Seeds

State = Literal["ok", "warning", "broken"]

EXTRAS = {
    "flower": ("flwr",),
    "simulation": ("ray",),
    "eval": ("lm_eval",),
    "dp": ("dp_accounting",),
    "tracking": ("tensorboard", "mlflow", "wandb", "trackio"),
}
"""Modules of the optional extras."""

_SMALL_MEMORY_BYTES = 2 * 10**9
_SMALL_DISK_BYTES = 2 * 10**9


@final
@dataclass(frozen=True, slots=True)
class Check:
    """What one check found. `broken`: emberfed cannot do its work here."""

    name: str
    state: State
    detail: str


def examine(folder: Path) -> Iterator[Check]:
    """Carry out the checks of this machine one by one; runs would be written below `folder`."""
    yield Check("emberfed", "ok", f"{emberfed.__version__} on {_system()}")
    yield _libraries()
    yield _device()
    yield _threads()
    yield _memory()
    yield _bf16()
    yield _disk(folder)
    yield _extras()


def examine_model(config: RunConfig) -> tuple[Check, tuple[ModuleMemory, ...]]:
    """Load a model and let it do its task once; return what was found, and what its weights occupy, in all last."""
    started = time.perf_counter()
    name = "the built-in model" if config.model.path == "builtin" else config.model.path
    try:
        model, found = _generates(config) if config.data.task == "generation" else _chooses(config)
    except EmberfedError as error:
        return Check("model", "broken", str(error)), ()
    seconds = numbers.seconds(time.perf_counter() - started)
    rows = memory_by_module(model.lm)
    memory = (*rows, total(rows))
    if found:
        return Check("model", "ok", f"{name} {found} in {seconds}"), memory
    if config.model.path == "builtin":
        return Check("model", "broken", f"{name} gives an empty answer; install emberfed again"), memory
    return Check("model", "warning", f"{name} loads in {seconds}, but answers a plain question with nothing"), memory


def _generates(config: RunConfig) -> tuple[FoundationModel, str]:
    """Load a model that generates, and say what it answers; nothing if that is empty. Raises: ModelError."""
    tokenizer = config.task.processor(config.model)
    model = config.task.model(config.model, tokenizer, ())
    text = _answer(model, tokenizer)
    return model, f"answers {text!r}" if text else ""


def _chooses(config: RunConfig) -> tuple[FoundationModel, str]:
    """Load a model that chooses a class, and try it on an example. Raises: ModelError, DataError."""
    task, section = config.task, config.data
    processor, corpus = task.processor(config.model), task.corpus(section, Seeds(config.seed))
    model = task.model(config.model, processor, corpus.classes)
    shard = task.shard(corpus.test.select([0]), processor, section, corpus.classes, "test split")
    with torch.inference_mode():
        task.forward(model, shard.collate(shard.examples).to(model.device))
    return model, f"has a head for {len(corpus.classes)} classes and runs"


def _system() -> str:
    return f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"


def _libraries() -> Check:
    try:
        found = versions()
    except importlib.metadata.PackageNotFoundError as error:
        return Check("libraries", "broken", f"{error.name} is not installed; install emberfed again")
    return Check("libraries", "ok", ", ".join(f"{name} {number}" for name, number in found.items() if name != "python"))


def _device() -> Check:
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        names = ", ".join(f"{card.name} ({numbers.byte_size(card.total_memory)})" for card in cards)
        return Check("device", "ok", f"CUDA: {names}; `model.device: auto` takes the first")
    if shutil.which("nvidia-smi"):
        return Check(
            "device",
            "warning",
            "an NVIDIA driver is here but torch finds no CUDA device: this torch may be the CPU build; "
            "training will use the CPU",
        )
    return Check("device", "ok", "CPU")


def _threads() -> Check:
    threads, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    detail = f"torch uses {threads} of {cores} cores this process may use"
    if threads > cores:
        return Check("threads", "warning", f"{detail}: they will wait for each other; set OMP_NUM_THREADS={cores}")
    return Check("threads", "ok", detail)


def _memory() -> Check:
    memory = psutil.virtual_memory()
    detail = f"{numbers.byte_size(memory.available)} of {numbers.byte_size(memory.total)} free"
    if memory.available < _SMALL_MEMORY_BYTES:
        return Check("memory", "warning", f"{detail}; the quickstart fits, larger models may not")
    return Check("memory", "ok", detail)


def _bf16() -> Check:
    if torch.cuda.is_available():
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Check("bf16", "ok", "native on this device")
        return Check("bf16", "warning", "emulated on this device: use model.dtype=float32 or float16")
    ratio = _seconds(torch.bfloat16) / _seconds(torch.float32)
    if ratio > 1:
        detail = f"{ratio:.1f} times as slow as float32 on this CPU: keep model.dtype=float32 where memory allows"
        return Check("bf16", "warning", detail)
    return Check("bf16", "ok", f"{1 / ratio:.1f} times as fast as float32 on this CPU")


def _seconds(dtype: torch.dtype) -> float:
    """Return the least time of a few matrix products."""
    matrix = torch.ones(512, 512, dtype=dtype)

    def once() -> float:
        started = time.perf_counter()
        matrix @ matrix
        return time.perf_counter() - started

    return min(once() for _ in range(5))


def _disk(folder: Path) -> Check:
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{numbers.byte_size(free)} free for runs in {existing}"
    if not os.access(existing, os.W_OK):
        return Check("disk", "warning", f"{existing} cannot be written; give `--output` a folder that can")
    if free < _SMALL_DISK_BYTES:
        return Check("disk", "warning", f"{detail}; a round keeps every client's adapter (output.keep_uploads: false)")
    return Check("disk", "ok", detail)


def _extras() -> Check:
    def state(modules: tuple[str, ...]) -> str:
        found = [module for module in modules if importlib.util.find_spec(module) is not None]
        if len(modules) > 1 and found:
            return ", ".join(found)
        return "installed" if found else "not installed"

    return Check("extras", "ok", "; ".join(f"{name}: {state(modules)}" for name, modules in EXTRAS.items()))


def _answer(model: FoundationModel, tokenizer: PreTrainedTokenizerBase) -> str:
    record = corpus(1, Seeds(0))[0]
    prompt = f"### Instruction:\n{record['instruction']}\n\n### Input:\n{record['context']}\n\n### Response:\n"
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    end = tokenizer.eos_token_id
    answer = model.lm.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=end, pad_token_id=end)
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert isinstance(text, str)
    return " ".join(text.split())
