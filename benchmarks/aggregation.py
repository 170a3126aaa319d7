"""What putting clients' updates together costs a server.

`rules`: one layer of OLMoE-1B-7B (64 experts, attention), eight clients, float32 in memory. Each rule takes turns with
two plain copies of the clients' bytes, one into memory that is there (`copy`) and one into new memory (`clone`), which
is what a rule's result needs. Clients have rank 20, or 12, 16, 24, 40 twice where a method takes it. Times 16 is the
whole model.

`flexlora`: the components that FlexLoRA keeps, ours against the SVD of the dense mean, on a few experts and one
attention matrix; the layer is these times their number.

`memory`: by how much resident memory rises at most while the uploads of 10 and of 100 clients are averaged from disk,
as the server does. A layer of 16 experts.

CPU seconds, one thread, medians. Writes `benchmarks/results/aggregation.json`.
"""

from __future__ import annotations

import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "aggregation.json"
LAYERS, EXPERTS, HIDDEN, INNER, RANK = 16, 64, 2048, 1024, 20
MIXED_RANKS = (12, 16, 24, 40) * 2
CLIENTS = len(MIXED_RANKS)
REPEATS = 7
FLEXLORA_EXPERTS, FLEXLORA_REPEATS = 2, 3
MEMORY_EXPERTS, MEMORY_CLIENTS = 16, (10, 100)
RULES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "a3smoe": ("a3smoe", {}),
    "flame": ("flame", {}),
    "homolora": ("homolora", {}),
    "hetlora, data": ("hetlora", {"weighting": "data"}),
    "hetlora, norm": ("hetlora", {}),
    "flora": ("flora", {}),
}
AVERAGING = ("a3smoe", "flame", "homolora", "hetlora, norm")
EXPERT_SHAPES = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
Run = Callable[[], object]


def main() -> None:
    """Measure, print and save."""
    rows = [*_child("rules"), *_child("flexlora")]
    with tempfile.TemporaryDirectory() as folder:
        _child("uploads", folder)
        rows += [
            row for rule in AVERAGING for clients in MEMORY_CLIENTS for row in _child("memory", folder, rule, clients)
        ]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    _print(rows)


def _child(*arguments: object) -> list[dict[str, Any]]:
    """Measure one thing in a process of its own; return its rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if arguments[0] == "memory":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "benchmarks.aggregation", *map(str, arguments)]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def measure(what: str, *arguments: str) -> None:
    """Print one JSON line per row."""
    import torch

    torch.set_num_threads(1)
    if what == "uploads":
        _write_uploads(Path(arguments[0]))
        return
    parts: Mapping[str, Callable[..., Iterator[dict[str, Any]]]]
    parts = {"rules": _rules, "flexlora": _flexlora, "memory": _memory}
    for row in parts[what](*arguments):
        print(json.dumps({"part": what, **row}), flush=True)


def _rules() -> Iterator[dict[str, Any]]:
    from emberfed.method import load_method

    for ranks in ((RANK,) * CLIENTS, MIXED_RANKS):
        updates = [_update(number, rank, EXPERTS) for number, rank in enumerate(ranks)]
        previous = _tensors(max(ranks), EXPERTS)
        held = [tensor for update in updates for tensor in update.tensors.values()]
        there = [tensor.clone() for tensor in held]

        def copy(held: Sequence[Any] = held, there: Sequence[Any] = there) -> None:
            for tensor, place in zip(held, there, strict=True):
                place.copy_(tensor)

        def clone(held: Sequence[Any] = held) -> object:
            return [tensor.clone() for tensor in held]

        runs: dict[str, Run] = {"copy": copy, "clone": clone}
        for rule, (name, options) in RULES.items():
            if ranks is not MIXED_RANKS or name in ("hetlora", "flora"):
                method = load_method(name)
                runs[rule] = partial(method.combine, updates, method.Config(**options), previous)
        seconds = _medians(runs, REPEATS)
        for rule, median in seconds.items():
            yield {
                "rule": rule,
                "ranks": sorted(set(ranks)),
                "bytes": sum(tensor.nbytes for tensor in held),
                "cpu_seconds": median,
                "of_copy": median / seconds["copy"],
                "of_clone": median / seconds["clone"],
            }


def _flexlora() -> Iterator[dict[str, Any]]:
    import torch

    from emberfed import factors
    from emberfed.factors import Pair

    matrices = {"expert": ((FLEXLORA_EXPERTS,), (INNER, HIDDEN), 3 * EXPERTS), "attention": ((), (HIDDEN, HIDDEN), 4)}
    weights = torch.full((CLIENTS,), 1 / CLIENTS)
    for matrix, (stack, (outputs, inputs), in_layer) in matrices.items():
        generator = torch.Generator().manual_seed(0)
        pairs = [
            Pair(
                torch.randn(*stack, rank, inputs, generator=generator),
                torch.randn(*stack, outputs, rank, generator=generator),
            )
            for rank in MIXED_RANKS
        ]
        largest = max(MIXED_RANKS)
        previous = Pair(torch.zeros(*stack, largest, inputs), torch.zeros(*stack, outputs, largest))

        def ours(pairs: list[Pair] = pairs, previous: Pair = previous) -> Any:
            return factors.principal(pairs, weights, previous)

        def dense(pairs: list[Pair] = pairs, largest: int = largest) -> Any:
            mean = sum(w / pair.rank * pair.b @ pair.a for w, pair in zip(weights.tolist(), pairs, strict=True))
            u, s, vh = torch.linalg.svd(mean, full_matrices=False)
            return (u * s[..., None, :])[..., :largest] @ vh[..., :largest, :]

        seconds = _medians({"principal": ours, "svd": dense}, FLEXLORA_REPEATS)
        found, expected = ours(), dense()
        difference = (found.b @ found.a / found.rank - expected).abs().max() / expected.abs().max()
        measured = stack[0] if stack else 1
        yield {
            "matrix": matrix,
            "measured": measured,
            "in_layer": in_layer,
            "cpu_seconds": seconds["principal"] / measured,
            "svd_cpu_seconds": seconds["svd"] / measured,
            "times_faster": seconds["svd"] / seconds["principal"],
            "largest_relative_difference": float(difference),
        }


def _memory(folder: str, rule: str, clients: str) -> Iterator[dict[str, Any]]:
    from emberfed import federated
    from emberfed.method import load_method
    from emberfed.records import Payload

    uploads = [Payload.open(file) for file in sorted(Path(folder).iterdir())[: int(clients)]]
    updates = federated.updates_of(uploads, {"sparse_layers": [0], "num_experts": MEMORY_EXPERTS})
    name, options = RULES[rule]
    method = load_method(name)
    previous = _tensors(RANK, MEMORY_EXPERTS)
    method.combine(updates[:2], method.Config(**options), previous)  # what the first call loads is not the uploads'
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    method.combine(updates, method.Config(**options), previous)
    upload_bytes = sum(tensor.nbytes for tensor in previous.values())
    yield {
        "rule": rule,
        "clients": int(clients),
        "upload_bytes": upload_bytes,
        "extra_peak_bytes": _status("VmHWM") - before,
    }


def _write_uploads(folder: Path) -> None:
    import torch

    from emberfed.records import ACTIVATION_COUNTS, Bundle, Payload

    for number in range(max(MEMORY_CLIENTS)):
        update = _update(number, RANK, MEMORY_EXPERTS)
        counts = torch.stack(list(update.activations.values()))
        meta = {"examples": update.examples, "tokens": update.tokens, "top_k": update.top_k, "stats": {}}
        content = Bundle({**update.tensors, ACTIVATION_COUNTS: counts}, meta)
        (folder / update.client).write_bytes(Payload(1, update.client, content).to_bytes())


def _update(number: int, rank: int, experts: int) -> Any:
    import torch

    from emberfed.aggregation import Update

    return Update(
        client=f"client-{number:03}",
        tensors=_tensors(rank, experts, seed=number),
        examples=100 + number,
        tokens=4096,
        top_k=2 ** (number % 4),
        activations={"layers.0.experts.": torch.arange(experts) + number},
    )


def _tensors(rank: int, experts: int, seed: int = 0) -> dict[str, Any]:
    """Return one layer's LoRA."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for matrix, (outputs, inputs) in EXPERT_SHAPES.items():
        tensors[f"layers.0.experts.{matrix}.lora_A"] = torch.randn(experts, rank, inputs, generator=generator)
        tensors[f"layers.0.experts.{matrix}.lora_B"] = torch.randn(experts, outputs, rank, generator=generator)
    for matrix in ATTENTION:
        tensors[f"layers.0.self_attn.{matrix}.lora_A"] = torch.randn(rank, HIDDEN, generator=generator)
        tensors[f"layers.0.self_attn.{matrix}.lora_B"] = torch.randn(HIDDEN, rank, generator=generator)
    return tensors


def _medians(runs: Mapping[str, Run], repeats: int) -> dict[str, float]:
    """Return the median CPU seconds of each; they take turns, after one round that does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if repeat:
                found[name].append(time.process_time() - started)
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _print(rows: list[dict[str, Any]]) -> None:
    print(f"{'rule':<15}{'ranks':>16}{'MB':>7}{'CPU s':>8}{'model s':>9}{'of copy':>9}{'of clone':>10}")
    for row in (row for row in rows if row["part"] == "rules"):
        ranks = " ".join(map(str, row["ranks"]))
        print(
            f"{row['rule']:<15}{ranks:>16}{row['bytes'] / 1e6:>7.0f}{row['cpu_seconds']:>8.3f}"
            f"{LAYERS * row['cpu_seconds']:>9.2f}{row['of_copy']:>8.2f}x{row['of_clone']:>9.2f}x"
        )
    print(f"\n{'FlexLoRA':<15}{'CPU s each':>11}{'SVD s each':>11}{'faster':>8}{'model s':>9}{'difference':>12}")
    for row in (row for row in rows if row["part"] == "flexlora"):
        whole = LAYERS * row["in_layer"] * row["cpu_seconds"]
        print(
            f"{row['matrix']:<15}{row['cpu_seconds']:>11.4f}{row['svd_cpu_seconds']:>11.3f}"
            f"{row['times_faster']:>7.0f}x{whole:>9.0f}{row['largest_relative_difference']:>12.1e}"
        )
    print(f"\n{'from disk':<15}{'clients':>8}{'upload MB':>11}{'extra peak MB':>15}")
    for row in (row for row in rows if row["part"] == "memory"):
        print(
            f"{row['rule']:<15}{row['clients']:>8}{row['upload_bytes'] / 1e6:>11.1f}"
            f"{row['extra_peak_bytes'] / 1e6:>15.1f}"
        )


if __name__ == "__main__":
    measure(*sys.argv[1:]) if len(sys.argv) > 1 else main()
