"""What one layer of the sparse adapter costs at k of 16 experts, against dense adapters of the same parameters.

Forward and backward, float32, one thread, in two child processes: one for CPU seconds, where all take turns and the
least of several repeats counts, and one for memory, where the allocator returns what is freed at once. `routed` is
ours; `dense` is one expert as wide as all of them together, in plain torch; `masked` computes all experts for all
tokens in two products and weighs those that were not chosen with zero, the simple way to write the same function.

Writes `benchmarks/results/sparse_adapter.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measuring import Run, cpu_seconds, extra_peak_bytes

RESULT = Path(__file__).parent / "results" / "sparse_adapter.json"
TOP_K = (8, 4, 2, 1)
SHAPES = ((768, 512), (768, 2048), (2048, 512), (2048, 2048))
"""Hidden size and tokens: a ViT or BERT of the base size, and a language model."""
EXPERTS, EXPERT_SIZE = 16, 64
REPEATS = 7


def main() -> None:
    """Measure, print and save."""
    times, memory = _child("cpu_seconds"), _child("extra_peak_bytes")
    rows = [{**row, **memory[key]} for key, row in times.items()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    _print(rows)


def _child(what: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Measure one thing in a process of its own; return rows by hidden size, tokens, top_k and implementation."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if what == "extra_peak_bytes":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "benchmarks.sparse_adapter", what]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    keys = ("hidden", "tokens", "top_k", "implementation")
    return {tuple(row[key] for key in keys): row for row in map(json.loads, lines)}


def measure(what: str) -> None:
    """Print one JSON line per case. `what` is cpu_seconds or extra_peak_bytes."""
    import torch

    torch.set_num_threads(1)
    measured, repeats = (cpu_seconds, REPEATS) if what == "cpu_seconds" else (extra_peak_bytes, 1)
    for hidden, tokens, runs in _cases():
        for run in runs.values():
            run()  # the first time allocates
        found: dict[tuple[int, str], list[float]] = {key: [] for key in runs}
        for _ in range(repeats):
            for key, run in runs.items():
                found[key].append(measured(run))
        for (top_k, name), values in found.items():
            row = {"hidden": hidden, "tokens": tokens, "top_k": top_k, "implementation": name, what: min(values)}
            print(json.dumps(row), flush=True)


def _cases() -> Iterator[tuple[int, int, Mapping[tuple[int, str], Run]]]:
    """Yield hidden size, tokens, and what to run by top_k and implementation; they take turns."""
    for hidden, tokens in SHAPES:
        yield hidden, tokens, _runs(hidden, tokens)


def _runs(hidden: int, tokens: int) -> Mapping[tuple[int, str], Run]:
    import torch
    from torch.nn import functional as F

    from emberfed.models.routed_adapter import AdapterLayer, routed_adapter

    generator = torch.Generator().manual_seed(0)
    width = EXPERTS * EXPERT_SIZE

    def drawn(*shape: int) -> torch.Tensor:
        return (0.05 * torch.randn(shape, generator=generator)).requires_grad_()

    down, up, router = drawn(EXPERTS, EXPERT_SIZE, hidden), drawn(EXPERTS, hidden, EXPERT_SIZE), drawn(EXPERTS, hidden)
    wide_down, wide_up = drawn(width, hidden), drawn(hidden, width)
    x = torch.randn(tokens, hidden, generator=generator).requires_grad_()
    target = torch.randn(tokens, hidden, generator=generator)
    layer = AdapterLayer(down, up, router)

    def backward(out: torch.Tensor) -> None:
        out.backward(target)  # type: ignore[no-untyped-call]
        for tensor in (x, down, up, router, wide_down, wide_up):
            tensor.grad = None

    def routed(top_k: int) -> None:
        backward(routed_adapter(layer, x, top_k).out_TD)

    def dense() -> None:
        backward(F.gelu(x @ wide_down.t()) @ wide_up.t())

    def masked(top_k: int) -> None:
        logits, index = (x @ router.t()).topk(top_k)
        gates = torch.zeros(tokens, EXPERTS).scatter(1, index, logits.softmax(-1))
        inner = F.gelu(x @ wide_down.t()).view(tokens, EXPERTS, EXPERT_SIZE) * gates.unsqueeze(-1)
        backward(inner.flatten(1) @ wide_up.t())

    runs: dict[tuple[int, str], Run] = {}
    for top_k in TOP_K:
        runs[top_k, "routed"] = partial(routed, top_k)
        runs[top_k, "masked"] = partial(masked, top_k)
    runs[EXPERTS, "dense"] = dense
    return runs


def _print(rows: list[dict[str, Any]]) -> None:
    by_key = {(row["hidden"], row["tokens"], row["top_k"], row["implementation"]): row for row in rows}
    print(f"{'D':>5}{'tokens':>7}{'k':>4}{'':>9}{'CPU ms':>9}{'of k = 8':>10}{'extra MB':>10}{'of k = 8':>10}")
    for row in rows:
        ours = by_key[row["hidden"], row["tokens"], max(TOP_K), "routed"]
        print(
            f"{row['hidden']:>5}{row['tokens']:>7}{row['top_k']:>4}{row['implementation']:>9}"
            f"{1e3 * row['cpu_seconds']:>9.1f}{row['cpu_seconds'] / ours['cpu_seconds']:>10.2f}"
            f"{row['extra_peak_bytes'] / 1e6:>10.1f}{row['extra_peak_bytes'] / max(1, ours['extra_peak_bytes']):>10.2f}"
        )


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
