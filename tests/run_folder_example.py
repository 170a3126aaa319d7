"""Makes run folders that look like real ones, of any size, for the report's tests."""

from __future__ import annotations

import json
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

TIERS = (("phone", 1), ("tablet", 2), ("laptop", 4), ("workstation", 8))
CATEGORIES = (
    "arithmetic",
    "classification",
    "closed_qa",
    "extraction",
    "listing",
    "ordering",
    "rewriting",
    "summarising",
)
STEPS = 12


def write_run(
    folder: Path, *, clients: int = 8, rounds: int = 3, layers: int = 4, experts: int = 32, seed: int = 1
) -> Path:
    """Write a finished run of `rounds` rounds into `folder` and return it."""
    draw = random.Random(seed)
    folder.mkdir(parents=True)
    names = [f"c{number}" for number in range(clients)]
    partition = {name: _shard(draw) for name in names}
    lines = [
        _client(draw, number, place, partition[name], layers, experts)
        for number in range(1, rounds + 1)
        for place, name in enumerate(names)
        if (number, place) != (2, 3)
    ]
    metrics = [_evaluation(draw, 0, *tier) for tier in TIERS]
    for number in range(1, rounds + 1):
        metrics.append(_round(number, [line for line in lines if line["round"] == number]))
        metrics += [_evaluation(draw, number, *tier) for tier in TIERS]
    write_lines(folder / "metrics.jsonl", metrics)
    write_lines(folder / "clients.jsonl", lines)
    parameters = {"by": "category", "alpha": 0.5}
    write_json(folder / "partition.json", {"kind": "dirichlet", "parameters": parameters, "clients": partition})
    write_json(folder / "run.json", _info(seed, layers, experts))
    (folder / "config.yaml").write_text(
        f"model: {{path: builtin, dtype: float32}}\nmethod: {{name: a3smoe, temperature: 2.0}}\n"
        f"data: {{path: builtin, partition: {{kind: dirichlet, by: category, alpha: 0.5}}}}\n"
        f"training: {{rounds: {rounds}, learning_rate: 1e-3}}\nseed: {seed}\n"
    )
    events = [
        {"time": "2026-01-05T10:00:00Z", "level": "info", "message": "run started"},
        {"time": "2026-01-05T10:01:12Z", "level": "warning", "message": "client c3 failed in round 2"},
    ]
    write_lines(folder / "events.jsonl", events)
    return folder


def make_classification(folder: Path) -> Path:
    """Make a run of `write_run` one of image classification with a sparse adapter, whose clients have own models.

    Accuracies are what ROUGE-L was; a client's own model has its tier's accuracy plus 0.01 for each number of its name.
    """
    info = json.loads((folder / "run.json").read_text())
    tiers = [{"name": name, "top_k": 1, "adapter_top_k": top_k, "rank": 8, "share": 0.25} for name, top_k in TIERS]
    info |= {"name": "pictures", "metric": "accuracy", "experts": "adapter", "tiers": tiers}
    info["model"] |= {"family": "vit", "num_experts": 1, "native_top_k": 1}
    info["method"] |= {"name": "fft_moe", "title": "FFT-MoE"}
    write_json(folder / "run.json", info)
    lines = [_classified(line) for line in read_lines(folder / "metrics.jsonl")]
    clients = [line | {"top_k": 1} for line in read_lines(folder / "clients.jsonl")]
    write_lines(folder / "clients.jsonl", clients)
    tier_of = {line["client"]: line["tier"] for line in clients}
    personal = []
    for number in sorted({line["round"] for line in lines}):
        accuracy = {line["tier"]: line["accuracy"] for line in lines if line["round"] == number and "accuracy" in line}
        personal += _personal(number, {name: (tier, accuracy[tier]) for name, tier in tier_of.items()})
    write_lines(folder / "metrics.jsonl", [*lines, *personal])
    return folder


def _classified(line: dict[str, Any]) -> dict[str, Any]:
    if "rouge_l" not in line:
        return line
    kept = {key: value for key, value in line.items() if key not in ("rouge_l", "perplexity", "top_k", "categories")}
    scores = {
        name: {"accuracy": score["rouge_l"], "loss": score["loss"], "examples": score["examples"]}
        for name, score in line["categories"].items()
    }
    own = {"accuracy": line["rouge_l"], "top_k": 1, "adapter_top_k": line["top_k"], "categories": scores}
    return kept | own


def _personal(number: int, clients: dict[str, tuple[str, float]]) -> list[dict[str, Any]]:
    """Return a line for each client, and one for all of them."""
    lines = [
        {
            "round": number,
            "event": "personal",
            "client": name,
            "tier": tier,
            "top_k": 1,
            "adapter_top_k": dict(TIERS)[tier],
            "accuracy": accuracy + 0.01 * int(name[1:]),
            "loss": 2.0 - accuracy,
            "examples": 12,
        }
        for name, (tier, accuracy) in clients.items()
    ]
    values = sorted(float(str(line["accuracy"])) for line in lines)
    worst = values[: max(1, math.ceil(len(values) / 10))]
    summary = {
        "round": number,
        "event": "personal_summary",
        "clients": len(lines),
        "mean": statistics.fmean(values),
        "worst_decile": statistics.fmean(worst),
        "spread": statistics.pstdev(values),
        "loss_mean": 1.5,
    }
    return [*lines, summary]


def write_lines(path: Path, lines: Iterable[Any]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _info(seed: int, layers: int, experts: int) -> dict[str, Any]:
    return {
        "name": "quickstart",
        "emberfed_version": "0.1.0",
        "created": "2026-01-05T10:00:00Z",
        "method": {"name": "a3smoe", "title": "A³SMoE", "paper": "https://arxiv.org/abs/2600.00001"},
        "git": "0123456789abcdef",
        "seed": seed,
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"cpu": "2 cores", "memory_bytes": 8_000_000_000, "device": "cpu"},
        "model": {
            "path": "builtin",
            "family": "olmoe",
            "parameters": 4_650_000,
            "num_experts": experts,
            "native_top_k": 8,
            "layers": layers,
        },
        "data": {"examples": 640, "held_out": 80, "duplicates_removed": 12, "dropped": {"empty_target": 3}},
        "tiers": [{"name": name, "top_k": top_k, "share": 0.25} for name, top_k in TIERS],
    }


def _shard(draw: random.Random) -> dict[str, Any]:
    weights = [draw.gammavariate(0.5, 1) for _ in CATEGORIES]
    labels = {name: round(60 * weight / sum(weights)) for name, weight in zip(CATEGORIES, weights, strict=True)}
    kept = {name: number for name, number in labels.items() if number}
    examples = sum(kept.values())
    return {"examples": examples, "labels": kept, "target_tokens": examples * draw.randint(12, 24)}


def _client(
    draw: random.Random, number: int, place: int, shard: dict[str, Any], layers: int, experts: int
) -> dict[str, Any]:
    tier, top_k = TIERS[place % len(TIERS)]
    start = 3.4 - 0.25 * top_k**0.5 - 0.5 * (number - 1) + draw.uniform(-0.1, 0.1)
    losses = [[step, start * math.exp(-0.03 * step) + draw.uniform(-0.12, 0.12)] for step in range(1, STEPS + 1)]
    tokens = shard["examples"] * 48
    counts = [_counts(draw, tokens * top_k, top_k, experts) for _ in range(layers)]
    return {
        "round": number,
        "client": f"c{place}",
        "tier": tier,
        "top_k": top_k,
        "examples": shard["examples"],
        "bytes_down": 1_830_000 + 100 * top_k,
        "bytes_up": 1_210_000 + 70_000 * top_k,
        "seconds": 2.1 + 0.4 * top_k,
        "peak_memory_bytes": 412_000_000 + 1_000_000 * top_k,
        "loss_first": losses[0][1],
        "loss_last": losses[-1][1],
        "loss_mean": sum(loss for _, loss in losses) / STEPS,
        "losses": losses,
        "tokens": tokens,
        "target_tokens": shard["target_tokens"],
        "steps": STEPS,
        "flops": tokens * (9_000_000 + 2_400_000 * top_k),
        "share_of_experts_touched": sum(number > 0 for row in counts for number in row) / (layers * experts),
        "activation_counts": counts,
    }


def _counts(draw: random.Random, assignments: int, top_k: int, experts: int) -> list[int]:
    weights = [draw.expovariate(1) ** (1 + 2 / top_k) for _ in range(experts)]
    return [round(assignments * weight / sum(weights)) for weight in weights]


def _evaluation(draw: random.Random, number: int, tier: str, top_k: int) -> dict[str, Any]:
    start, end = {1: (0.06, 0.31), 2: (0.14, 0.36), 4: (0.3, 0.4), 8: (0.47, 0.455)}[top_k]
    rouge = start + (end - start) * (1 - 0.4**number) + draw.uniform(-0.004, 0.004)
    loss = 3.1 - 3.6 * rouge
    scores = [max(0.0, rouge + draw.uniform(-0.08, 0.08)) for _ in CATEGORIES]
    return {
        "round": number,
        "event": "evaluation",
        "tier": tier,
        "top_k": top_k,
        "rouge_l": rouge,
        "loss": loss,
        "perplexity": math.exp(loss),
        "examples": 80,
        "categories": {
            name: {"rouge_l": score, "loss": 3.1 - 3.6 * score, "examples": 10}
            for name, score in zip(CATEGORIES, scores, strict=True)
        },
        "seconds": 3.25,
    }


def _round(number: int, lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    training = sum(line["seconds"] for line in lines)
    return {
        "round": number,
        "event": "round",
        "seconds": training + 13 + 0.8,
        "training_seconds": training,
        "evaluation_seconds": 13.0,
        "overhead_seconds": 0.8,
        "bytes_down": sum(line["bytes_down"] for line in lines),
        "bytes_up": sum(line["bytes_up"] for line in lines),
        "flops": sum(line["flops"] for line in lines),
        "peak_memory_bytes": 416_000_000,
        "replied": [line["client"] for line in lines],
        "failed": {"c3": "non-finite loss at step 4"} if number == 2 else {},
        "refused": {},
        "share_of_experts_trained": 0.93,
        "train_loss": sum(line["loss_mean"] for line in lines) / len(lines),
    }
