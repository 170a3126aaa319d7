"""What profiling experts costs in 4 and 8 bits, and how far such a profile, or last round's, is from the true one.

The quickstart's federation, or one with the settings given as arguments (`python -m benchmarks.profiling
model.path=FOLDER data.path=FILE`), is trained with A3SMoE for some rounds. Before each round every client's data is
profiled with the global model of that moment: in full precision, which is the reference, and by copies in fewer bits;
a stale profile is the one before. Errors are means over clients.

Child processes measure the profile of the client with most examples: CPU seconds of one thread, the least of several
repeats taken in turns, and by how much memory rose at most, in a process whose allocator returns what is freed at once.

Round 0 is the base model. Writes `benchmarks/results/profiling.json` (with arguments: prints only).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import Run, cpu_seconds, extra_peak_bytes

if TYPE_CHECKING:
    import torch

    from emberfed.data.shard import Shard
    from emberfed.models.foundation_model import FoundationModel
    from emberfed.models.profiling import Profile

RESULT = Path(__file__).parent / "results" / "profiling.json"
SETTINGS = ("training.rounds=2", "evaluation.every=0", "data.limit=288")
BATCH = 16
TOP = 8
REPEATS = 3
SHOWN = ("frequency_relative", "attention_relative", "overlap", "variation")
FIGURES = ("frequency_absolute", "frequency_relative", "attention_absolute", "attention_relative", "overlap")


def main(overrides: Sequence[str] = ()) -> None:
    """Measure, print and save."""
    settings = [*SETTINGS, *overrides]
    costs = _costs(settings)
    errors = list(_errors(settings))
    print(f"{'what':<28} {'CPU s':>8} {'extra peak MB':>14}")
    for row in costs:
        print(f"{row['what']:<28} {row['cpu_seconds']:>8.2f} {row['extra_peak_bytes'] / 1e6:>14.2f}")
    print(
        f"{'round':>5} {'profile':<16} {'freq abs':>9} {'freq rel':>9} {'att rel':>9} {'overlap':>8} {'variation':>9}"
    )
    for row in errors:
        absolute, *shares = (row[name] for name in ("frequency_absolute", *SHOWN))
        print(f"{row['round']:>5} {row['profile']:<16} {absolute:>9.5f}", *(f"{share:>9.2%}" for share in shares))
    if not overrides:
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps({"costs": costs, "errors": errors}, indent=1) + "\n")


def _costs(settings: Sequence[str]) -> list[dict[str, Any]]:
    """Measure in child processes."""
    times, memory = (_child(what, settings) for what in ("cpu_seconds", "extra_peak_bytes"))
    return [{"what": what, "cpu_seconds": times[what], "extra_peak_bytes": memory[what]} for what in times]


def _child(what: str, settings: Sequence[str]) -> dict[str, float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if what == "extra_peak_bytes":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "benchmarks.profiling", "--measure", what, *settings]
    told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, float] = json.loads(told.splitlines()[-1])
    return found


def measure(what: str, settings: Sequence[str]) -> None:
    """Print one JSON line of what each way takes. `what` is cpu_seconds or extra_peak_bytes."""
    import torch

    torch.set_num_threads(1)
    measured, repeats = (cpu_seconds, REPEATS) if what == "cpu_seconds" else (extra_peak_bytes, 1)
    runs = _runs(settings)
    for run in runs.values():
        run()  # the first time allocates
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(measured(run))
    print(json.dumps({name: min(values) for name, values in found.items()}))


def _runs(settings: Sequence[str]) -> Mapping[str, Run]:
    """Return what to run, on the examples of the client that has most."""
    from emberfed.models.low_bits import low_bit_copy
    from emberfed.models.profiling import profile

    model, shards = _gathered(settings)
    shard = max(shards.values(), key=lambda shard: len(shard.examples))
    four, eight = low_bit_copy(model, 4), low_bit_copy(model, 8)

    return {
        "full, without attention": lambda: void(profile(model, _batches(shard), attention=False)),
        "full": lambda: void(profile(model, _batches(shard))),
        "8 bits": lambda: void(profile(eight, _batches(shard))),
        "4 bits": lambda: void(profile(four, _batches(shard))),
        "making the copy in 4 bits": lambda: void(low_bit_copy(model, 4)),
    }


def void(_: object) -> None:
    """Forget a result."""


def _gathered(settings: Sequence[str]) -> tuple[FoundationModel, dict[str, Shard]]:
    from emberfed import assembly, config

    material = assembly.gather(config.load(None, settings))
    return material.model, dict(material.shards)


def _batches(shard: Shard) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for start in range(0, len(shard.examples), BATCH):
        batch: Any = shard.collate(shard.examples[start : start + BATCH])
        yield batch.input_ids, batch.attention_mask


def _errors(settings: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Train, and yield the errors of each kind of profile before each round and after the last."""
    import torch

    import emberfed
    from emberfed.checkpoint import RunFolder
    from emberfed.models import lora, peft_layout
    from emberfed.models.low_bits import low_bit_copy

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = emberfed.run(None, overrides=settings, output=Path(folder) / "run").path
        model, shards = _gathered(settings)
        copies = {"full": model, "8 bits": low_bit_copy(model, 8), "4 bits": low_bit_copy(model, 4)}
        before: dict[str, list[Profile]] = {}
        for round in RunFolder.open(path).rounds():
            exported = emberfed.export(path, output=Path(folder) / f"round {round}", format="peft", round=round)
            tensors, alpha = peft_layout.from_peft(exported, model)
            now: dict[str, list[Profile]] = {}
            for name, copy in copies.items():
                with lora.attached(copy, tensors, alpha):
                    now[name] = _profiles(copy, shards)
            fresh = {name: profiles for name, profiles in now.items() if name != "full"}
            stale = {f"{name}, stale": profiles for name, profiles in before.items()}
            for name, profiles in {**fresh, **stale}.items():
                yield {"round": round, "profile": name, **_mean_error(profiles, now["full"])}
            before = now


def _profiles(model: FoundationModel, shards: Mapping[str, Shard]) -> list[Profile]:
    from emberfed.models.profiling import profile

    return [profile(model, _batches(shard)) for shard in shards.values()]


def _mean_error(profiles: Sequence[Profile], references: Sequence[Profile]) -> dict[str, float]:
    from emberfed.models.profiling import error

    errors = [error(found, reference, TOP) for found, reference in zip(profiles, references, strict=True)]
    figures = {name: mean(getattr(told, name) for told in errors) for name in FIGURES}
    return {**figures, "variation": mean(float(told.variation_L.mean()) for told in errors)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main(sys.argv[1:])
