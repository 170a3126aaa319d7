"""What expert layers with LoRA cost: ours, PEFT's, the frozen layer, and a plain matrix product of the same work.

Forward and backward, float32, one thread, random routing, in two child processes: one for CPU seconds, where all
implementations take turns and the least of several repeats counts, and one for memory, where the allocator returns
what is freed at once. Scopes: `layer` is one layer of OLMoE-1B-7B's shape, `model` a whole small model, `client_round`
a client's round of four
optimiser steps. PEFT runs on transformers' grouped products, its
fastest experts; `matmul` is `torch.mm` on large matrices, as many times as gives the layer's FLOPs.

Writes `benchmarks/results/routed_lora.json` and `routed_lora.png`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.measuring import Run, cpu_seconds, extra_peak_bytes

RESULT = Path(__file__).parent / "results" / "routed_lora.json"
PICTURE = RESULT.with_suffix(".png")
TOP_K = (8, 4, 2, 1)
TOKENS = (128, 512, 2048)
HIDDEN, INNER, EXPERTS, RANK, ALPHA = 2048, 1024, 64, 20, 16.0
SMALL = {"hidden_size": 192, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6}
STEPS, BATCH, LENGTH, VOCABULARY = 4, 16, 160, 4096
REPEATS = {"peft": 2}
DEFAULT_REPEATS = 5


def main() -> None:
    """Measure, print and save."""
    times, memory = _child("cpu_seconds"), _child("extra_peak_bytes")
    rows = [{**row, **memory[key]} for key, row in times.items()]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    _print(rows)
    _draw(rows)


def _child(what: str) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Measure one thing in a process of its own; return rows by scope, tokens, top_k and implementation."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if what == "extra_peak_bytes":
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    command = [sys.executable, "-m", "benchmarks.routed_lora", what]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return {
        tuple(row[key] for key in ("scope", "tokens", "top_k", "implementation")): row for row in map(json.loads, lines)
    }


def measure(what: str) -> None:
    """Print one JSON line per case. `what` is cpu_seconds or extra_peak_bytes."""
    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for scope, tokens, top_k, runs in _cases():
        for run in runs.values():
            run()  # the first time compiles and allocates
        found: dict[str, list[float]] = {name: [] for name in runs}
        for repeat in range(DEFAULT_REPEATS if what == "cpu_seconds" else 1):
            for name, run in runs.items():
                if repeat < REPEATS.get(name, DEFAULT_REPEATS):
                    found[name].append(cpu_seconds(run) if what == "cpu_seconds" else extra_peak_bytes(run))
        for name, values in found.items():
            row = {"scope": scope, "tokens": tokens, "top_k": top_k, "implementation": name, what: min(values)}
            print(json.dumps(row), flush=True)


def _cases() -> Iterator[tuple[str, int, int, Mapping[str, Run]]]:
    """Yield scope, tokens, top_k and what to run."""
    layer = _Layer()
    for tokens in TOKENS:
        for top_k in TOP_K:
            yield "layer", tokens, top_k, layer.runs(tokens, top_k)
    del layer
    for top_k in TOP_K:
        yield "model", BATCH * LENGTH, top_k, _model_runs(top_k)
    for top_k in TOP_K:
        yield "client_round", STEPS * BATCH * LENGTH, top_k, {"routed": _client_round(top_k)}


class _Layer:
    """One experts module under several implementations."""

    def __init__(self) -> None:
        import torch
        from torch import nn
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        from emberfed.models.routed_lora import IMPLEMENTATION, MATRICES, ExpertLora

        sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_experts": EXPERTS}
        self.experts = OlmoeExperts(OlmoeConfig(**sizes)).requires_grad_(False)
        self.generator = torch.Generator().manual_seed(0)
        for parameter in self.experts.parameters():
            parameter.data = self._random(parameter.shape)
        shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        factors = {}
        for matrix in MATRICES:
            out, in_ = shapes[matrix]
            a, b = self._random((EXPERTS, RANK, in_)), self._random((EXPERTS, out, RANK))
            factors[matrix] = (nn.Parameter(a), nn.Parameter(b))
        self.lora = ExpertLora(factors, ALPHA)
        self.implementation = IMPLEMENTATION

    def _random(self, shape: Any) -> Any:
        import torch

        return 0.02 * torch.randn(shape, generator=self.generator)

    def runs(self, tokens: int, top_k: int) -> Mapping[str, Run]:
        """Return what to run for that many tokens."""
        import torch

        hidden = torch.randn(tokens, HIDDEN, generator=self.generator, requires_grad=True)
        target = torch.randn(tokens, HIDDEN, generator=self.generator)
        logits = torch.randn(tokens, EXPERTS, generator=self.generator)
        gates, index = logits.softmax(-1).topk(top_k)
        gates.requires_grad_()

        def through(experts: Any, implementation: str, trained: list[Any]) -> None:
            self.experts.config._experts_implementation = implementation
            experts(hidden, index, gates).backward(target)
            for tensor in (hidden, gates, *trained):
                tensor.grad = None

        def routed() -> None:
            self.experts.add_module("emberfed_lora", self.lora)
            through(self.experts, self.implementation, list(self.lora.parameters()))
            del self.experts.emberfed_lora

        def frozen() -> None:
            through(self.experts, self.implementation, [])

        def peft() -> None:
            wrapped, unwrap = _peft(self.experts)
            through(wrapped, "grouped_mm", [p for p in wrapped.parameters() if p.requires_grad])
            unwrap()

        return {"routed": routed, "frozen": frozen, "peft": peft, "matmul": _plain_product(tokens * top_k)}


def _peft(experts: Any) -> tuple[Any, Run]:
    """Return the experts inside PEFT's LoRA and how to take them out again."""
    import peft
    from torch import nn

    holder = nn.Module()
    holder.add_module("experts", experts)
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=[],
        target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        init_lora_weights=False,
    )
    model = peft.get_peft_model(holder, config)
    return model.base_model.model.experts, model.unload


def _plain_product(pairs: int) -> Run:
    """Return products of large matrices with the FLOPs of the frozen layer, forward and backward."""
    import torch

    size = 2048
    left, right = torch.ones(size, size), torch.ones(size, size)
    wanted = 2 * pairs * 3 * HIDDEN * INNER  # multiply-adds
    whole, rest = divmod(wanted, size**3)

    def run() -> None:
        for _ in range(whole):
            left @ right
        if rest:
            left[: max(1, rest // size**2)] @ right

    return run


def _small_lm() -> Any:
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    sizes = {**SMALL, "num_experts": EXPERTS, "num_experts_per_tok": 8, "vocab_size": VOCABULARY, "eos_token_id": 1}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OlmoeForCausalLM(OlmoeConfig(**sizes, pad_token_id=0))


def _model_runs(top_k: int) -> Mapping[str, Run]:
    """Forward and backward of the whole small model, with LoRA on experts only."""
    import peft
    import torch

    from emberfed.models import lora
    from emberfed.models.foundation_model import FoundationModel

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=generator)
    ours = FoundationModel(_small_lm())
    fresh = lora.initial(ours, lora.LoraConfig(rank=RANK, alpha=ALPHA, attention=False), generator)

    theirs = _small_lm().requires_grad_(False)
    theirs.config.num_experts_per_tok = theirs.num_experts_per_tok = top_k
    for layer in theirs.model.layers:
        layer.mlp.gate.top_k = top_k
    theirs.set_experts_implementation("grouped_mm")
    names = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    theirs = peft.get_peft_model(theirs, config)

    def routed() -> None:
        with ours.active_experts(top_k), lora.attached(ours, fresh, ALPHA):
            ours.lm(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    def frozen() -> None:
        with ours.active_experts(top_k):
            embedded = ours.lm.get_input_embeddings()(ids).requires_grad_()
            ours.lm(inputs_embeds=embedded, labels=ids, use_cache=False).loss.backward()

    def others() -> None:
        theirs(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        theirs.zero_grad()

    return {"routed": routed, "frozen": frozen, "peft": others}


def _client_round(top_k: int) -> Run:
    """An A3SMoE client's round: LoRA of rank 20 on attention and experts, batches of 16 examples of 160 tokens."""
    import numpy as np
    import torch

    from emberfed.data.tokenise import Example, ResponseShard, ShardReport
    from emberfed.models import lora
    from emberfed.models.foundation_model import FoundationModel
    from emberfed.seeds import Seeds
    from emberfed.training import Trainer, TrainingConfig

    generator = torch.Generator().manual_seed(0)
    model = FoundationModel(_small_lm())
    fresh = lora.initial(model, lora.LoraConfig(rank=RANK, alpha=ALPHA), generator)
    ids = torch.randint(1, VOCABULARY, (STEPS * BATCH, LENGTH), generator=generator).numpy().astype(np.int32)
    half = LENGTH // 2
    report = ShardReport(len(ids), len(ids) * half, 0, 0, 0)
    shard = ResponseShard(tuple(Example(row, half, "", "") for row in ids), report, 0)
    trainer = Trainer(TrainingConfig(batch_size=BATCH))

    def run() -> None:
        with model.active_experts(top_k), lora.attached(model, fresh, ALPHA) as adapter:
            trainer.train(model, adapter, shard, "bench", 1, Seeds(0))

    return run


def _print(rows: list[dict[str, Any]]) -> None:
    by_key = {(row["scope"], row["tokens"], row["top_k"], row["implementation"]): row for row in rows}
    print(
        f"{'scope':<12}{'tokens':>7}{'K':>3}{'implementation':>16}"
        f"{'CPU s':>9}{'of ours':>9}{'extra MB':>10}{'of ours':>9}"
    )
    for row in rows:
        ours = by_key[row["scope"], row["tokens"], row["top_k"], "routed"]
        times, bytes_ = (row[key] / max(ours[key], 1) if key == "extra_peak_bytes" else row[key] / ours[key]
                         for key in ("cpu_seconds", "extra_peak_bytes"))  # fmt: skip
        print(
            f"{row['scope']:<12}{row['tokens']:>7}{row['top_k']:>3}{row['implementation']:>16}"
            f"{row['cpu_seconds']:>9.3f}{times:>8.2f}x{row['extra_peak_bytes'] / 1e6:>10.1f}{bytes_:>8.2f}x"
        )


def _draw(rows: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {"cpu_seconds": "CPU seconds", "extra_peak_bytes": "extra peak memory, bytes"}
    for place, (key, title) in enumerate(titles.items(), start=1):
        axes = figure.add_subplot(1, 2, place)
        for name in ("peft", "routed", "frozen", "matmul"):
            line = [row for row in rows if (row["scope"], row["tokens"], row["implementation"]) == ("layer", 512, name)]
            if key == "cpu_seconds" or name != "matmul":
                axes.plot([row["top_k"] for row in line], [row[key] for row in line], marker="o", label=name)
        axes.set(xlabel="active experts K", ylabel=title, yscale="log", xscale="log", xticks=TOP_K)
        axes.set_xticklabels([str(k) for k in TOP_K])
        axes.minorticks_off()
        axes.grid(True, alpha=0.3)
        axes.legend()
    figure.suptitle(
        "One OLMoE-1B-7B layer with LoRA of rank 20: 512 tokens, forward + backward, float32, one CPU thread"
    )
    figure.savefig(PICTURE, dpi=110)


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
