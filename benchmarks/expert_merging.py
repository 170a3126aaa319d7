"""What merging experts costs, and how good it is.

`merging`: 16 layers of OLMoE-1B-7B's shape (64 experts of 6.3 M parameters, bfloat16), random, one layer at a time, to
a quarter of the experts: inner products and PCA of each layer, clusters of all layers, weighted sums of each layer.
Drawing the weights is counted apart. `held` is how many experts may be in memory in float32.

`scikit-learn`: the same features and clusters by its PCA and KMeans, layer by layer: one layer, times 16.

`clustering`: only the clusters, from features that are there: all layers at once, and its KMeans for each layer.

`error`: what merging does to a model (the built-in one on its data, and one of a folder and data file given): every
expert may be merged (`none` tuned), or the most used ones are half of what is held (`half`). Relative error of the
experts' output, mean over layers, each given the whole model's inputs; relative error of the last hidden states; KL
divergence of the next token per token; loss of held-out responses above the whole model's. Means over three seeds.

CPU seconds, one thread. Writes `benchmarks/results/expert_merging.json`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measuring import cpu_seconds, extra_peak_bytes

if TYPE_CHECKING:
    import torch

    from emberfed.data.tokenise import ResponseBatch
    from emberfed.models.compact import CompactPlan
    from emberfed.models.expert_merging import BudgetRule, WeightRule
    from emberfed.models.expert_values import ExpertMatrices, ExpertValues
    from emberfed.models.foundation_model import FoundationModel

RESULT = Path(__file__).parent / "results" / "expert_merging.json"
LAYERS, EXPERTS, HIDDEN, INNER = 16, 64, 2048, 1024
HELD = (64, 16)
SHARES = (0.25, 0.5)
SEEDS = 3
REPEATS = 5
PROFILED, EVALUATED, BATCH = 96, 48, 16


def main() -> None:
    """Measure, print and save."""
    parts: list[tuple[str, ...]] = [("merging", str(held)) for held in HELD]
    parts += [("scikit-learn",), ("clustering",), ("error",)]
    if sys.argv[1:]:
        parts.append(("error", *sys.argv[1:]))
    rows = [row for part in parts for row in _child(*part)]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{value}" for key, value in row.items()))


def _child(*arguments: str) -> list[dict[str, Any]]:
    """Measure one thing in a process of its own; return its rows."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.expert_merging", "--part", *arguments]
    lines = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    return [json.loads(line) for line in lines]


def measure(what: str, *arguments: str) -> None:
    """Print one JSON line per row."""
    import torch

    torch.set_num_threads(1)
    parts: Mapping[str, Callable[..., Iterator[dict[str, Any]]]]
    parts = {"merging": _merging, "scikit-learn": _scikit_learn, "clustering": _clustering, "error": _error}
    for row in parts[what](*arguments):
        print(json.dumps({"part": what, **row}), flush=True)


def _layer(row: int) -> Callable[[int], ExpertMatrices]:
    """Draw a layer; return what reads one of its experts."""
    import torch

    from emberfed.models.expert_values import ExpertMatrices

    generator = torch.Generator().manual_seed(row)
    stacks = [torch.empty(EXPERTS, *shape, dtype=torch.bfloat16) for shape in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))]
    for stack in stacks:
        for expert in stack:
            expert.copy_(torch.randn(expert.shape, generator=generator))
    return lambda expert: ExpertMatrices(stacks[0][expert].float(), stacks[1][expert].float(), None, None)


def _merging(held: str) -> Iterator[dict[str, Any]]:
    import torch

    from emberfed.models import expert_merging

    frequency_LE = torch.rand(LAYERS, EXPERTS, generator=torch.Generator().manual_seed(0)) / 4
    seconds = {"drawing": 0.0, "inner_products": 0.0, "pca": 0.0, "clusters": 0.0, "sums": 0.0}
    features: list[torch.Tensor] = []
    peak = 0.0
    for row in range(LAYERS):
        read = _timed(seconds, "drawing", partial(_layer, row))
        if row == 0:
            peak = extra_peak_bytes(partial(_ignored, partial(expert_merging.gram, read, EXPERTS, int(held))))
        products_EE = _timed(seconds, "inner_products", partial(expert_merging.gram, read, EXPERTS, int(held)))
        features.append(_timed(seconds, "pca", partial(expert_merging.principal_features, products_EE)))
        del read
    none: list[list[int]] = [[]] * LAYERS
    merged = LAYERS * EXPERTS // 4
    features_LED, generator = torch.stack(features), torch.Generator().manual_seed(0)
    made = partial(expert_merging.plan, none, none, merged, frequency_LE, frequency_LE, features_LED, generator)
    plan = _timed(seconds, "clusters", made)
    for row in range(LAYERS):
        read = _timed(seconds, "drawing", partial(_layer, row))
        _timed(seconds, "sums", partial(_sums, read, plan, row))
        del read
    drawing = seconds.pop("drawing")
    yield {"held": int(held), **seconds, "all": sum(seconds.values()), "drawing": drawing, "extra_peak_bytes": peak}


def _ignored(run: Callable[[], object]) -> None:
    run()


def _timed(seconds: dict[str, float], part: str, run: Callable[[], Any]) -> Any:
    started = time.process_time()
    found = run()
    seconds[part] += time.process_time() - started
    return found


def _sums(read: Callable[[int], ExpertMatrices], plan: CompactPlan, row: int) -> None:
    """Merge one layer into stacks of its slots."""
    import torch

    gate_up, down = (
        torch.zeros(plan[row].slots, *shape, dtype=torch.bfloat16) for shape in ((HIDDEN, 2 * INNER), (INNER, HIDDEN))
    )
    for slot, cluster in enumerate(plan[row].clusters):
        sums = [torch.zeros(HIDDEN, 2 * INNER), torch.zeros(INNER, HIDDEN)]
        for expert, weight in zip(cluster.members, cluster.weights, strict=True):
            found = read(expert)
            for total, matrix in zip(sums, (found.gate_up_D2F, found.down_FD), strict=True):
                total.add_(matrix, alpha=weight)
        gate_up[slot], down[slot] = sums


def _scikit_learn() -> Iterator[dict[str, Any]]:
    import torch
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from torch.nn import functional as F

    from emberfed.models.expert_merging import DIMENSIONS

    read = _layer(0)
    rows = torch.empty(EXPERTS, 3 * HIDDEN * INNER)
    for expert in range(EXPERTS):
        found = read(expert)
        torch.cat([found.gate_up_D2F.flatten(), found.down_FD.flatten()], out=rows[expert])
    del read
    features: list[Any] = []
    pca = cpu_seconds(lambda: features.append(PCA(DIMENSIONS, random_state=0).fit_transform(rows.numpy())))
    unit = F.normalize(torch.from_numpy(features[0]), dim=1).numpy()
    clusters = cpu_seconds(lambda: KMeans(EXPERTS // 4, n_init=10, random_state=0).fit(unit))
    yield {"pca": LAYERS * pca, "clusters": LAYERS * clusters}


def _clustering() -> Iterator[dict[str, Any]]:
    import torch
    from sklearn.cluster import KMeans
    from torch.nn import functional as F

    from emberfed.models import expert_merging

    features_LED = torch.randn(LAYERS, EXPERTS, expert_merging.DIMENSIONS, generator=torch.Generator().manual_seed(0))
    unit_LED = F.normalize(features_LED.double(), dim=-1)
    merged_LE = torch.ones(LAYERS, EXPERTS, dtype=torch.bool)
    wanted = [EXPERTS // 4] * LAYERS
    runs: dict[str, Callable[[], torch.Tensor]] = {}
    for restarts in (1, expert_merging.RESTARTS):
        runs[f"all layers at once, {restarts} starts"] = partial(_clusters, features_LED, merged_LE, wanted, restarts)
    for starts in (1, 10):
        fits = [KMeans(number, n_init=starts, random_state=0) for number in wanted]
        runs[f"scikit-learn, {starts} starts"] = lambda fits=fits: torch.stack(  # type: ignore[misc]
            [torch.from_numpy(fit.fit(unit.numpy()).labels_) for fit, unit in zip(fits, unit_LED, strict=True)]
        )
    for name, run in runs.items():
        labels_LE = run().long()
        centres = F.one_hot(labels_LE).double().mT @ unit_LED
        cosine_LE = (unit_LED @ F.normalize(centres, dim=-1).mT).gather(2, labels_LE[..., None])
        seconds = statistics.median(cpu_seconds(partial(_ignored, run)) for _ in range(REPEATS))
        yield {"implementation": name, "cpu_seconds": seconds, "sum_of_1_minus_cosine": float((1 - cosine_LE).sum())}


def _clusters(features_LED: torch.Tensor, merged_LE: torch.Tensor, wanted: list[int], restarts: int) -> torch.Tensor:
    import torch

    from emberfed.models.expert_merging import cluster

    return cluster(features_LED, merged_LE, wanted, torch.Generator().manual_seed(0), restarts)


def _error(model_path: str = "builtin", data_path: str = "builtin") -> Iterator[dict[str, Any]]:
    import torch

    from emberfed.models import expert_merging
    from emberfed.models.expert_values import ExpertValues
    from emberfed.models.profiling import profile

    model, profiled, evaluated = _material(model_path, data_path)
    found = profile(model, [(batch.input_ids, batch.attention_mask) for batch in profiled])
    frequency_LE, attention_LE = found.frequency_LE, found.attention_LE
    layers, experts = frequency_LE.shape
    values, whole = ExpertValues(model, {}, {}, 1.0), _Outputs(model, evaluated)
    products_LEE = torch.stack(
        [expert_merging.gram(partial(values.matrices, row), experts, experts) for row in range(layers)]
    )
    features_LED = torch.stack([expert_merging.principal_features(products_EE) for products_EE in products_LEE])
    budgets: tuple[BudgetRule, ...] = ("uniform", "adaptive")
    each_weight: tuple[WeightRule, ...] = ("attention_frequency", "frequency", "uniform")
    rules: list[tuple[BudgetRule, WeightRule]] = [("one", "attention_frequency")]
    rules += [(budget, weight) for budget in budgets for weight in each_weight]
    for share in SHARES:
        for tuning in ("none", "half"):
            held = int(share * layers * experts)
            each = held // (2 * layers) if tuning == "half" else 0
            tuned = frequency_LE.argsort(dim=1, descending=True, stable=True)[:, :each].tolist()
            common: dict[str, Any] = {
                "tuned": tuned,
                "singles": [[]] * layers,
                "merged": held - layers * each,
                "frequency_LE": frequency_LE,
                "attention_LE": attention_LE,
            }
            case = {"model": Path(model_path).name, "held": share, "tuned": tuning}
            for budget, weight in rules:
                plans = [
                    expert_merging.plan(
                        **common,
                        features_LED=features_LED,
                        generator=torch.Generator().manual_seed(seed),
                        budget_rule=budget,
                        weight_rule=weight,
                    )
                    for seed in range(SEEDS)
                ]
                yield {**case, "budget": budget, "weights": weight, **whole.mean(plans, values)}
            for weight in each_weight[:2]:
                plans = [expert_merging.least_error_plan(**common, products_LEE=products_LEE, weight_rule=weight)]
                yield {**case, "budget": "least error", "weights": weight, **whole.mean(plans, values)}


def _material(model_path: str, data_path: str) -> tuple[FoundationModel, list[ResponseBatch], list[ResponseBatch]]:
    from emberfed.data.config import DataConfig
    from emberfed.data.loading import load
    from emberfed.data.tokenise import tokenise
    from emberfed.models import loading
    from emberfed.models.config import ModelConfig
    from emberfed.seeds import Seeds

    model, tokenizer = loading.load(ModelConfig(path=model_path))
    config = DataConfig(path=data_path, test_size=EVALUATED, limit=PROFILED + EVALUATED, max_length=128)
    corpus = load(config, Seeds(0))
    batches = []
    for records in (corpus.train, corpus.test):
        shard = tokenise(records, tokenizer, config, "the benchmark")
        starts = range(0, len(shard.examples), BATCH)
        batches.append([shard.collate(shard.examples[start : start + BATCH]) for start in starts])
    return model, batches[0], batches[1]


class _Outputs:
    """What the whole model gives for some batches, and how far plans are from it."""

    def __init__(self, model: FoundationModel, batches: list[ResponseBatch]) -> None:
        self._model, self._batches = model, batches
        self._layers: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in model.blocks]

        def keep(row: int, _: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            self._layers[row].append((*args[:3], output))

        hooks = [block.experts.register_forward_hook(partial(keep, row)) for row, block in enumerate(model.blocks)]
        self._hidden, self._log_chances, self._loss = self._run()
        for hook in hooks:
            hook.remove()

    def mean(self, plans: list[CompactPlan], values: ExpertValues) -> dict[str, float]:
        """Return the mean errors of several plans."""
        found = [self._errors(plan, values) for plan in plans]
        return {key: statistics.mean(row[key] for row in found) for key in found[0]}

    def _errors(self, plan: CompactPlan, values: ExpertValues) -> dict[str, float]:
        import torch

        from emberfed.models.compact import compacted
        from emberfed.models.expert_merging import output_error

        with compacted(self._model, plan, values), torch.no_grad():
            hidden, log_chances, loss = self._run()
            layers = []
            for block, calls in zip(self._model.blocks, self._layers, strict=True):
                merged = torch.cat([block.experts(*inputs) for *inputs, _ in calls])
                layers.append(output_error(merged, torch.cat([output for *_, output in calls])))
        divergence = (self._log_chances.exp() * (self._log_chances - log_chances)).sum(-1).mean()
        return {
            "layer_error": statistics.mean(layers),
            "hidden_error": output_error(hidden, self._hidden),
            "kl": float(divergence),
            "loss_rise": loss - self._loss,
        }

    def _run(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return last hidden states and log chances of the next token, of real tokens, and the loss of responses."""
        import torch
        from torch.nn import functional as F

        from emberfed.data.tokenise import IGNORED

        hidden, log_chances, loss = [], [], 0.0
        with torch.no_grad():
            for batch in self._batches:
                inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
                states = self._model.lm.base_model(**inputs, use_cache=False).last_hidden_state
                found = self._model.lm.get_output_embeddings()(states).float().log_softmax(-1)
                real = batch.attention_mask.bool()
                hidden.append(states[real])
                log_chances.append(found[real])
                targets = batch.labels[:, 1:].flatten()
                loss += float(F.nll_loss(found[:, :-1].flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum"))
        return torch.cat(hidden), torch.cat(log_chances), loss / sum(batch.targets for batch in self._batches)


if __name__ == "__main__":
    measure(*sys.argv[2:]) if sys.argv[1:2] == ["--part"] else main()
