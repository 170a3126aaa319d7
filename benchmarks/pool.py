"""What processes cost and bring: memory of one, two and four with weights shared and not, and seconds of a round.

A random OLMoE of about 200 MB in float32, made here; the quickstart's data; four clients, two steps each, one thread a
process. Every row is a run of two rounds in a child process of its own, in turns. `memory_bytes` is the proportional
set size of the server and all its processes together after the second round (a page that n of them hold counts once;
a sum of resident sizes would count it n times), `peak_bytes` the largest seen while it ran, `seconds` those of the
second round, `start_seconds` by how much the first took longer.

Writes `benchmarks/results/pool.json`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from typing import Any, final

import psutil

RESULT = Path(__file__).parent / "results" / "pool.json"
REPEATS = 3
PROCESSES = (1, 2, 4)
CLIENTS = 4
MODEL = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 4, "num_experts": 16}


def main() -> None:
    """Measure, print and save."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        _child("model", str(model))
        kinds = [("local", 1, False), *(("pool", count, shared) for shared in (True, False) for count in PROCESSES)]
        rows = [
            _child("run", str(model), engine, str(count), str(int(shared)))
            for _ in range(REPEATS)
            for engine, count, shared in kinds
        ]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"model {rows[0]['model_bytes'] / 1e6:.0f} MB; medians of {REPEATS}")
    columns = ("engine", "processes", "shared", "MB", "peak MB", "round s", "/ local", "start s")
    print("".join(f"{column:>10}" for column in columns))
    local = _median([row for row in rows if row["engine"] == "local"], "seconds")
    for engine, count, shared in kinds:
        same = [row for row in rows if (row["engine"], row["processes"], row["shared"]) == (engine, count, shared)]
        memory, peak, seconds, start = (
            _median(same, key) for key in ("memory_bytes", "peak_bytes", "seconds", "start_seconds")
        )
        print(
            f"{engine:>10}{count:>10}{shared!s:>10}{memory / 1e6:>10.0f}{peak / 1e6:>10.0f}{seconds:>10.2f}"
            f"{seconds / local:>10.2f}{start:>10.1f}"
        )


def _median(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(statistics.median(row[key] for row in rows))


def _child(*arguments: str) -> Any:
    command = [sys.executable, "-m", "benchmarks.pool", *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def write_model(folder: Path) -> dict[str, Any]:
    """Write a random model of that size with the built-in tokenizer."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from emberfed.models.config import ModelConfig
    from emberfed.models.loading import load_tokenizer

    tokenizer = load_tokenizer(ModelConfig())
    torch.manual_seed(0)
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=8,
        num_key_value_heads=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **MODEL,
    )
    OlmoeForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return {}


def measure(model: Path, engine: str, processes: int, shared: bool) -> dict[str, Any]:
    """Run two rounds in this process and return their row."""
    from benchmarks import pool as apart  # under the name that other processes find it by
    from emberfed import assembly, config, rounds
    from emberfed.models.loading import cpu_threads

    section = {"name": engine} if engine == "local" else {"name": engine, "processes": processes}
    checked = config.load(
        None,
        [
            f"model.path={model}",
            "model.threads=1",
            f"engine={json.dumps(section)}",
            f"clients.count={CLIENTS}",
            "clients.fraction=1.0",
            f"data.limit={96 + 24 * CLIENTS}",
            "data.partition={kind: iid}",
            "training.rounds=2",
            "training.max_steps=2",
            "training.batch_size=2",
            "evaluation={every: 0, max_examples: 1, max_new_tokens: 1}",
        ],
    )
    with tempfile.TemporaryDirectory() as place, cpu_threads(1):
        material = assembly.gather(checked)
        folder = assembly.start(checked, Path(place) / "run", material)
        federation = assembly.federate(checked, folder, material)
        if engine == "pool" and not shared:
            given = federation.engine
            assert given.recipe is not None
            federation = replace(
                federation, engine=type(given)(given.config, apart.Own(given.clients), apart.Apart(given.recipe))
            )
        with _watched() as peak:
            try:
                rounds.run(federation, folder)
                memory = sum(_proportional_bytes())
            finally:
                federation.engine.close()
        first, second = (line["seconds"] for line in folder.metrics() if line["event"] == "round")
    return {
        "engine": engine,
        "processes": processes,
        "shared": shared,
        "model_bytes": sum(weight.nbytes for weight in material.model.lm.state_dict().values()),
        "memory_bytes": memory,
        "peak_bytes": max(peak),
        "seconds": second,
        "start_seconds": first - second,
    }


@final
class Own:
    """Clients whose model cannot be shared."""

    def __init__(self, clients: Any) -> None:
        self.answer = clients.answer
        self.idle = clients.idle


@final
@dataclass(frozen=True)
class Apart:
    """A recipe for them."""

    recipe: Any

    @contextmanager
    def open(self) -> Iterator[Any]:
        with self.recipe.open() as clients:
            yield Own(clients)


@contextmanager
def _watched() -> Iterator[list[int]]:
    """Give the memory of this process and those below it, again and again while the block runs."""
    seen, over = [sum(_proportional_bytes())], Event()

    def watch() -> None:
        while not over.wait(0.1):
            seen.append(sum(_proportional_bytes()))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def _proportional_bytes() -> Iterator[int]:
    for process in (psutil.Process(), *psutil.Process().children()):
        with suppress(OSError, StopIteration):  # it ended meanwhile
            account = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            yield int(next(line.split()[1] for line in account if line.startswith("Pss:"))) * 1024


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["model", folder]:
            print(json.dumps(write_model(Path(folder))))
        case ["run", model, engine, processes, shared]:
            print(json.dumps(measure(Path(model), engine, int(processes), bool(int(shared)))))
