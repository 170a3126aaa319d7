"""Whether the clients' clock says what training takes: modelled against measured seconds on this machine.

This machine is measured as a device (`emberfed.speed`); then local trainings of several models, numbers of active
experts, batches, lengths, ranks and adapters take turns, one step to warm up and some that count, and the median of the
repeats of each is set beside the clock's seconds for the same counted work. Three models of time: `sum`, where compute
and memory traffic follow each other (the clock's), `roofline`, where the longer hides the other, and `compute` alone.

Told are the rank correlation (Spearman), and the relative error of the model in its median and its most; the same after
one common factor, since a factor that all clients share changes no comparison. One thread. Wall time is what the clock
models; CPU time stands beside it, which other work on the machine disturbs less.

Writes `benchmarks/results/clock.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "clock.json"
REPEATS = 3
STEPS = 2
EXPERTS, VOCABULARY = 16, 2048


@dataclass(frozen=True)
class Case:
    """One training: the model's sizes, what is active, the batch, and what is trained."""

    hidden: int
    layers: int
    top_k: int
    batch: int
    length: int
    rank: int
    adapter: str = "lora"


CASES = (
    *(Case(256, 2, top_k, 8, 64, 8) for top_k in (1, 2, 4, 8)),
    *(Case(512, 4, top_k, 4, 64, 8) for top_k in (1, 2, 4, 8)),
    *(Case(512, 4, 2, batch, length, 8) for batch, length in ((1, 16), (1, 64), (8, 32), (8, 128))),
    *(Case(512, 2, 4, 4, 64, rank) for rank in (2, 16, 64)),
    *(Case(512, 4, 4, 4, 64, size, "sparse adapter") for size in (8, 64)),
    Case(768, 2, 1, 2, 16, 8),
    Case(768, 2, 8, 8, 96, 8),
    Case(64, 2, 4, 8, 32, 8),
)


def main() -> None:
    """Measure, print and save."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.clock", "measure"]
    found = json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)
    found["agreement"] = agreement(found["cases"])
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n")
    _print(found)


def measure() -> None:
    """Print the device and every case's counted work, modelled and measured seconds, as JSON."""
    import torch

    from emberfed import clock, speed

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        device = speed.measured("here", Path(folder))
    runs = {case: _run(case) for case in CASES}
    for run in runs.values():
        run()
    seconds: dict[Case, list[tuple[float, float]]] = {case: [] for case in CASES}
    efforts: dict[Case, clock.Effort] = {}
    for _ in range(REPEATS):
        for case, run in runs.items():
            wall, cpu = time.perf_counter(), time.process_time()
            efforts[case] = run()
            seconds[case].append((time.perf_counter() - wall, time.process_time() - cpu))
    rows = []
    for case, effort in efforts.items():
        compute = effort.flops / device.flops_per_second
        memory = effort.memory_traffic_bytes / device.memory_bytes_per_second
        rows.append(
            {
                **asdict(case),
                **asdict(effort),
                "sum_seconds": clock.work_seconds(device, effort),
                "roofline_seconds": max(compute, memory),
                "compute_seconds": compute,
                "memory_seconds": memory,
                "wall_seconds": statistics.median(wall for wall, _ in seconds[case]),
                "cpu_seconds": statistics.median(cpu for _, cpu in seconds[case]),
            }
        )
    print(json.dumps({"device": device.model_dump(mode="json"), "cases": rows}))


def _run(case: Case) -> Callable[[], Any]:
    """Return what trains a case for `STEPS` steps and returns its `Effort`."""
    import numpy as np
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    from emberfed.clock import Effort
    from emberfed.data.tokenise import Example, ResponseShard, ShardReport
    from emberfed.models import lora, sparse_adapter
    from emberfed.models.foundation_model import FoundationModel
    from emberfed.seeds import Seeds
    from emberfed.training import Trainer, TrainingConfig

    torch.manual_seed(0)
    sizes = {
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden,
        "num_hidden_layers": case.layers,
        "num_attention_heads": 8,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    model = FoundationModel(OlmoeForCausalLM(OlmoeConfig(**sizes)))
    draw = np.random.default_rng(0)
    made = tuple(
        Example(draw.integers(2, VOCABULARY, size=case.length).astype(np.int32), case.length // 2, "any", "")
        for _ in range(case.batch * STEPS)
    )
    report = ShardReport(len(made), sum(example.target_tokens for example in made), 0, 0, 0)
    shard = ResponseShard(made, report, pad_token_id=0)
    trainer = Trainer(TrainingConfig(batch_size=case.batch))
    if case.adapter == "lora":
        config = lora.LoraConfig(rank=case.rank, alpha=case.rank)
        tensors = lora.initial(model, config, torch.Generator().manual_seed(0))
        attach: Any = lambda: lora.attached(model, tensors, case.rank)  # noqa: E731
    else:
        beside = sparse_adapter.SparseAdapterConfig(num_experts=8, expert_size=case.rank)
        tensors = sparse_adapter.initial(model, beside, torch.Generator().manual_seed(0))
        attach = lambda: sparse_adapter.attached(model, tensors, 2)  # noqa: E731

    def run() -> Effort:
        with model.active_experts(case.top_k), attach() as adapter:
            stats = trainer.train(model, adapter, shard, "c0", 1, Seeds(0)).json()
        return Effort(stats["flops"], stats["memory_traffic_bytes"])

    return run


def agreement(cases: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each model of time and each measurement, rank correlation and relative errors."""
    return [
        _agreement(
            model, time_, [case[f"{model}_seconds"] for case in cases], [case[f"{time_}_seconds"] for case in cases]
        )
        for model in ("sum", "roofline", "compute")
        for time_ in ("wall", "cpu")
    ]


def _agreement(model: str, time_: str, modelled: Sequence[float], measured: Sequence[float]) -> dict[str, Any]:
    from scipy.stats import spearmanr

    factor = statistics.median(real / said for said, real in zip(modelled, measured, strict=True))
    errors = [abs(said / real - 1) for said, real in zip(modelled, measured, strict=True)]
    scaled = [abs(factor * said / real - 1) for said, real in zip(modelled, measured, strict=True)]
    return {
        "model": model,
        "measured": time_,
        "rank_correlation": float(spearmanr(modelled, measured).statistic),
        "median_error": statistics.median(errors),
        "largest_error": max(errors),
        "factor": factor,
        "median_error_after_factor": statistics.median(scaled),
        "largest_error_after_factor": max(scaled),
    }


def _print(found: Mapping[str, Any]) -> None:
    device = found["device"]
    print(
        f"\nthis machine: {device['flops_per_second'] / 1e9:.3g} GFLOP/s, "
        f"{device['memory_bytes_per_second'] / 1e9:.3g} GB/s, disk {device['disk_bytes_per_second'] / 1e9:.3g} GB/s"
    )
    print(
        f"\n{'adapter':>14} {'hidden':>6} {'layers':>6} {'K':>2} {'batch':>5} {'length':>6} {'rank':>4} {'compute':>8} "
        f"{'memory':>8} {'clock':>8} {'wall':>8} {'cpu':>8}  clock / wall"
    )
    for case in found["cases"]:
        clock_, wall = case["sum_seconds"], case["wall_seconds"]
        print(
            f"{case['adapter']:>14} {case['hidden']:>6} {case['layers']:>6} {case['top_k']:>2} {case['batch']:>5} "
            f"{case['length']:>6} {case['rank']:>4} {case['compute_seconds']:>8.4f} {case['memory_seconds']:>8.4f} "
            f"{clock_:>8.4f} {wall:>8.4f} {case['cpu_seconds']:>8.4f}  {clock_ / wall:.2f}"
        )
    for row in found["agreement"]:
        print(
            f"{row['model']:>9} against {row['measured']:>4}: rank correlation {row['rank_correlation']:.3f}, error "
            f"median {row['median_error']:.0%}, most {row['largest_error']:.0%}; after one factor of "
            f"{row['factor']:.2f}: {row['median_error_after_factor']:.0%}, {row['largest_error_after_factor']:.0%}"
        )


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["measure"] else main()
