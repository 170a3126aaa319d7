"""What methods share whose clients hold few experts and tune fewer: stacks of some experts, in payloads and state.

Free functions over the server's state, whose tensors named `layers.*` are the tuned experts (`models.tuning_layout`):
with `tune: lora` a LoRA of every expert, with `tune: full` the weights of those that were ever tuned. Uploads hold the
experts that the client was told to tune (`exploited`, by row), and no others.

Shapes: L layers with experts ("rows"), E experts, n experts that a stack holds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, Self, final

import torch
from pydantic import Field, model_validator
from torch import Tensor, int64

from emberfed import aggregation, federated, federated_lora
from emberfed.aggregation import Update
from emberfed.clients import Budget
from emberfed.data.shard import Shard
from emberfed.errors import AggregationError, ConfigError
from emberfed.expert_roles import Experts
from emberfed.federated_lora import GateOption
from emberfed.models import expert_tuning, lora, peft_layout
from emberfed.models.expert_values import ExpertValues
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora_layout import expert_sizes, layer_of
from emberfed.models.low_bits import holding
from emberfed.models.profiling import Profile, profile
from emberfed.models.quantised import QuantisedWeight
from emberfed.models.tuning_layout import Rows, Tune
from emberfed.records import ACTIVATION_COUNTS, Bundle, Json, Payload, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds

EXPERTS_FILE = "experts.safetensors"
"""What `export` writes where experts were trained in full."""


class ProfileConfig(Section):
    """Options of methods whose clients look at how their data uses the experts.

    Attributes:
        profile_bits: Bits of the experts' weights in the copy that a profile is made with; null: the model itself.
    """

    profile_bits: Literal[4, 8] | None = 4


class ExpertTuningConfig(Section):
    """How experts are tuned. Nothing else of the model is trained.

    Attributes:
        tune: `lora`: low-rank factors on the three matrices of an expert; `full`: the matrices themselves.
        rank: R of the LoRA.
        alpha: Its scale is alpha / rank.
    """

    tune: Tune = "lora"
    rank: int = Field(default=8, ge=1, le=65536)
    alpha: float = Field(default=16.0, ge=1e-6, le=1e6)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        for key in ("rank", "alpha"):
            if self.tune == "full" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with tune 'full'; leave it out, or set tune: lora")
        return self

    @property
    def lora(self) -> lora.LoraConfig:
        """The LoRA of all experts, and nothing else."""
        return lora.LoraConfig(rank=self.rank, alpha=self.alpha, attention=False, experts=True, head=False)


def check_held(model: FoundationModel, budgets: Sequence[Budget]) -> None:
    """Check that no tier holds more experts than there are. Raises: ConfigError naming the tier."""
    total = model.num_layers * model.num_experts
    for budget in budgets:
        if (budget.held_experts or 0) > total:
            raise ConfigError(
                f"clients.tiers: tier {budget.tier!r} holds {budget.held_experts} experts, but the model has "
                f"{model.num_layers} layers of {model.num_experts}; held_experts can be {total} at most"
            )


def check_budgets(model: FoundationModel, budgets: Sequence[Budget], who: str, merges: bool) -> None:
    """Check that every tier says what it can tune and hold, and that this is possible with the model.

    Args:
        model: The model.
        budgets: Of all tiers.
        who: The method's name.
        merges: Whether experts that are not tuned are merged, so that each layer needs one more.

    Raises: ConfigError naming the tier, what it has, and what is needed.
    """
    federated_lora.check_experts(model, who)
    check_held(model, budgets)
    layers, total = model.num_layers, model.num_layers * model.num_experts
    for budget in budgets:
        where = f"clients.tiers: tier {budget.tier!r}"
        tuned, held = budget.tuned_experts, budget.held_experts
        if tuned is None or held is None:
            missing = " and ".join(key for key in ("tuned_experts", "held_experts") if getattr(budget, key) is None)
            raise ConfigError(f"{where} has no {missing}, which {who} needs for every tier; add it")
        least = layers if not merges else min(tuned + layers, total)
        if held < least:
            why = f", {tuned} that are tuned and a merged one for each layer" if merges else ", one for each layer"
            raise ConfigError(
                f"{where} has room for {held} experts, too few for a model of {layers} layers with experts: it must "
                f"hold {least}{why}; raise held_experts{' or lower tuned_experts' if merges else ''}"
            )


def initial(model: FoundationModel, adapter: ExpertTuningConfig, seeds: Seeds) -> Bundle:
    """Return the state before round 1: experts as they are in the base."""
    matrices = {path.rpartition(".")[2]: list(size[1:]) for path, size in expert_sizes(model).items()}
    meta = {**federated_lora.layout(model), "tune": adapter.tune, "matrices": matrices, "trained": []}
    if adapter.tune == "full":
        return Bundle({}, meta)
    return Bundle(federated_lora.initial(model, adapter.lora, adapter.rank, "adapter.rank", seeds), meta)


def rows(experts: Sequence[Sequence[int]], sparse_layers: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Return experts given by row as `Rows`, by decoder layer; layers of which there is none are left out."""
    pairs = zip(sparse_layers, experts, strict=True)
    return {layer: tuple(of_layer) for layer, of_layer in pairs if of_layer}


def held_rows(meta: Mapping[str, Json]) -> dict[int, tuple[int, ...]]:
    """Return which experts the state's stacks, or a download's, hold: all with LoRA, else those ever tuned."""
    layers: Sequence[int] = meta["sparse_layers"]
    if meta["tune"] == "lora":
        return {layer: tuple(range(meta["num_experts"])) for layer in layers}
    return rows(meta["trained"] or [[] for _ in layers], layers)


def stacks_of(content: Bundle) -> dict[str, Tensor]:
    """Return the stacks of tuned experts in a state, a download, or a memory of one."""
    return federated.adapter_of(content.tensors)


def described(meta: Mapping[str, Json]) -> dict[str, Json]:
    """Return what a download, or a memory of one, says of the stacks it holds."""
    return {key: meta[key] for key in ("tune", "sparse_layers", "num_experts", "trained")}


def trained(meta: Mapping[str, Json], uploads: Sequence[Payload]) -> dict[str, Json]:
    """Return what the state says of experts that anybody tuned so far, by row."""
    before: Sequence[Sequence[int]] = meta["trained"] or [[] for _ in meta["sparse_layers"]]
    tuned = [upload.content.meta["exploited"] for upload in uploads]
    return {"trained": [sorted({*ids, *(e for some in tuned for e in some[row])}) for row, ids in enumerate(before)]}


def specs(state: Bundle, exploited: Experts) -> dict[str, TensorSpec]:
    """Return what an upload must hold of tuned experts, with the activation counts of all."""
    wanted = {ACTIVATION_COUNTS: counts_spec(state.meta)}
    for layer, ids in rows(exploited, state.meta["sparse_layers"]).items():
        for matrix, (outputs, inputs) in state.meta["matrices"].items():
            path = f"layers.{layer}.experts.{matrix}"
            if state.meta["tune"] == "full":
                wanted[f"{path}.weight"] = TensorSpec((len(ids), outputs, inputs), torch.float32)
                continue
            for side in ("lora_A", "lora_B"):
                shape = state.tensors[f"{path}.{side}"].shape[1:]
                wanted[f"{path}.{side}"] = TensorSpec((len(ids), *shape), torch.float32)
    return wanted


def counts_spec(meta: Mapping[str, Json]) -> TensorSpec:
    """Return what counts of experts must look like, (L, E)."""
    return TensorSpec((len(meta["sparse_layers"]), meta["num_experts"]), int64)


def batches(shard: Shard, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids and masks of all examples, in their order."""
    for start in range(0, len(shard.examples), size):
        batch: Any = shard.collate(shard.examples[start : start + size])
        yield batch.input_ids, batch.attention_mask


def profiled(
    model: FoundationModel,
    content: Bundle,
    alpha: float,
    top_k: int,
    gate: GateOption,
    shard: Shard,
    size: int,
    attention: bool,
) -> Profile:
    """Return how a shard uses the experts of a model with these tuned experts: a download's, or a memory's of one.

    Args:
        model: As loaded, or a copy in fewer bits; nothing attached.
        content: The tuned experts; all of them as in the base if it is empty.
        alpha: Of the LoRA.
        top_k: Experts active per token.
        gate: What is done with their weights.
        shard: The examples.
        size: Examples of one forward pass.
        attention: Whether to measure the attention that tokens receive.
    """
    with model.active_experts(top_k, gate), _as_held(model, content, alpha):
        return profile(model, batches(shard, size), attention)


@contextmanager
def _as_held(model: FoundationModel, content: Bundle, alpha: float) -> Iterator[None]:
    """Run a model for a profile: on a copy in few bits, experts that were tuned in full are held in as few."""
    tensors, held = stacks_of(content), held_rows(content.meta) if content.meta else {}
    in_few_bits = any(isinstance(block.experts.gate_up_proj, QuantisedWeight) for block in model.blocks)
    if not (in_few_bits and content.meta.get("tune") == "full"):
        with _whole(model, content, alpha):
            yield
        return
    values = ExpertValues(model, tensors, held if tensors else {}, alpha)
    with ExitStack() as stack:
        for row, block in enumerate(model.blocks):
            experts = {expert: values.matrices(row, expert) for expert in held.get(block.layer, ())}
            if experts:
                stack.enter_context(holding(model, row, experts))
        yield


@contextmanager
def _whole(model: FoundationModel, content: Bundle, alpha: float) -> Iterator[None]:
    """Run a model with all tuned experts in place inside the context."""
    tensors = stacks_of(content)
    if not tensors:
        yield
    elif content.meta["tune"] == "lora":
        with lora.attached(model, tensors, alpha):
            yield
    else:
        with expert_tuning.replaced(model, tensors, held_rows(content.meta)):
            yield


@contextmanager
def deployed(
    model: FoundationModel, state: Bundle, alpha: float, top_k: int, gate: GateOption
) -> Iterator[FoundationModel]:
    """Run the whole model with the state's experts and K active ones inside the context."""
    with model.active_experts(top_k, gate), _whole(model, state, alpha):
        yield model


def combine(updates: Sequence[Update], previous: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return each expert's mean over the clients that tuned it, by data size; others keep what they were.

    Args:
        updates: Of stacks of the same experts; a client tuned those of which it counted an activation.
        previous: What the clients began with; without it, experts that nobody tuned are averaged.

    Raises: AggregationError if the updates do not go together.
    """
    weights = aggregation.Weights(updates, unused=aggregation.unused(previous))
    combined = {}
    for name in aggregation.common_names(updates):
        if previous is not None:
            _check_previous(updates[0], name, previous)
        is_counted = weights.used(name) is not None
        if previous is None or not is_counted:
            combined[name] = aggregation.average_one(updates, name, weights, None)
        if is_counted:
            held = [_tuned(update, name) for update in updates]
            before = combined[name] if previous is None else previous[name]
            pairs = zip(aggregation.received(updates, name), held, strict=True)
            rows_ = (tensor[ids] for tensor, ids in pairs)
            combined[name] = aggregation.mean_of_holders(before, held, weights.shares_C, rows_)
    return combined


def _tuned(update: Update, name: str) -> list[int]:
    """Return the places, in a stack, of the experts that a client tuned."""
    pairs = update.activations.items()
    counts_E = next(counts_E for prefix, counts_E in pairs if name.startswith(f"{prefix.removesuffix('.')}."))
    return counts_E.nonzero()[:, 0].tolist()


def _check_previous(update: Update, name: str, previous: Mapping[str, Tensor]) -> None:
    if name not in previous:
        raise AggregationError(f"previous lacks {name!r}, which the clients sent; give all they began with, or nothing")
    found, before = update.tensors[name].shape, previous[name].shape
    if found != before:
        raise AggregationError(
            f"{update.client}: {name!r} has shape {tuple(found)}, but {tuple(before)} in previous; they must be equal"
        )


def updates_of(state: Bundle, uploads: Sequence[Payload]) -> tuple[list[Update], dict[str, Tensor]]:
    """Return uploads as aggregation sees them, and what the experts were: stacks of all that any stack now holds.

    Each upload's few experts are put among all that any stack holds; tensors are still read one at a time. Of an expert
    that is tuned for the first time it is not known what it was, nor does that matter: somebody brings its value.
    """
    layers: Sequence[int] = state.meta["sparse_layers"]
    before = held_rows(state.meta)
    given = [rows(upload.content.meta["exploited"], layers) for upload in uploads]
    after: dict[int, tuple[int, ...]] = {}
    for layer in layers:
        ids = sorted({*before.get(layer, ()), *(expert for some in given for expert in some.get(layer, ()))})
        if ids:
            after[layer] = tuple(ids)
    previous = stacks_of(state)
    if state.meta["tune"] == "full":
        previous = _grown(previous, before, after, state.meta["matrices"])
    updates = []
    for upload, theirs in zip(uploads, given, strict=True):
        counts = {
            f"layers.{layer}.experts.": torch.tensor([expert in theirs.get(layer, ()) for expert in ids]).long()
            for layer, ids in after.items()
        }
        meta = upload.content.meta
        stacks = _Among(previous, after, upload.content.tensors, theirs)
        updates.append(Update(upload.client, stacks, meta["examples"], meta["tokens"], meta["top_k"], counts))
    return updates, previous


def _grown(
    tensors: Mapping[str, Tensor], held: Rows, wanted: Rows, matrices: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """Return stacks of weights with room for more experts, zero where nothing is held."""
    grown = {}
    for layer, ids in wanted.items():
        places = [ids.index(expert) for expert in held.get(layer, ())]
        for matrix, shape in matrices.items():
            name = f"layers.{layer}.experts.{matrix}.weight"
            grown[name] = torch.zeros(len(ids), *shape)
            if places:
                grown[name][places] = tensors[name]
    return grown


@final
class _Among(Mapping[str, Tensor]):
    """One client's experts put in their places among those of the state, a stack at a time, when it is asked for."""

    def __init__(self, stacks: Mapping[str, Tensor], held: Rows, given: Mapping[str, Tensor], theirs: Rows) -> None:
        self._stacks = stacks
        self._held = held
        self._given = given
        self._theirs = theirs

    def __getitem__(self, name: str) -> Tensor:
        stack = self._stacks[name]
        layer = layer_of(name)
        if layer not in self._theirs:
            return stack
        places = [self._held[layer].index(expert) for expert in self._theirs[layer]]
        return stack.index_copy(0, torch.tensor(places), self._given[name].to(stack))

    def __iter__(self) -> Iterator[str]:
        return iter(self._stacks)

    def __len__(self) -> int:
        return len(self._stacks)


def export(state: Bundle, model: FoundationModel, alpha: float) -> Mapping[str, bytes]:
    """Return the files that let other programs open the tuned experts: a PEFT adapter, or their weights.

    `experts.safetensors` holds `layers.{l}.experts.{matrix}.weight` (n, out, in); `experts` in its header says which.
    """
    tensors = stacks_of(state)
    if state.meta["tune"] == "lora":
        return peft_layout.to_files(tensors, alpha, model)
    held = {str(layer): list(ids) for layer, ids in held_rows(state.meta).items()}
    return {EXPERTS_FILE: Bundle(tensors, {"experts": held}).to_bytes()}


def read_experts(file: bytes) -> tuple[dict[str, Tensor], Rows]:
    """Return the weights in an `experts.safetensors`, and which experts they are of. Raises: RunFolderError."""
    content = Bundle.from_bytes(file)
    return dict(content.tensors), {int(layer): tuple(ids) for layer, ids in content.meta["experts"].items()}
