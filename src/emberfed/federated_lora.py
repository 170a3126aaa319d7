"""What the LoRA methods share: whose rank it is, training with K active experts, uploads as updates, deploying.

Free functions over the server's state, whose tensors named `layers.*` are the global adapter (`models.lora_layout`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from emberfed import federated
from emberfed.aggregation import ActivationRule, Frequency
from emberfed.clients import Budget, Client
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.gating import Rescale
from emberfed.penalties import Penalty
from emberfed.records import Bundle, Json, Payload
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.training import Trainer

GateOption = Literal["native", "renormalised"]


class LoraMethodConfig(Section):
    """Options every LoRA baseline has.

    Attributes:
        active_experts: K in local training: `native` is the checkpoint's own for everybody, as published; `budget` is
            each tier's, so that a baseline trains with as many experts as it is evaluated with.
        gate: `native` or `renormalised` (weights of the K active experts sum to 1).
        weighting: A client's share in the mean: `data` by its examples; `activation` by its use of each expert too, as
            A3SMoE (then `frequency` and `temperature` count, as there).
        frequency: What counts as use of an expert: `per_activation_over_k`, `per_activation` or `per_token`.
        temperature: Exponent of the frequency.
    """

    active_experts: Literal["native", "budget"] = "native"
    gate: GateOption = "native"
    weighting: Literal["data", "activation"] = "data"
    frequency: Frequency = "per_activation_over_k"
    temperature: float = Field(2.0, ge=0)

    @model_validator(mode="after")
    def _nothing_without_effect(self) -> Self:
        for key in ("frequency", "temperature"):
            if self.weighting != "activation" and getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} has no effect with weighting {self.weighting!r}; set weighting: activation")
        return self

    @property
    def activation_rule(self) -> ActivationRule | None:
        """How the use of experts weighs; None where it does not."""
        return ActivationRule(self.frequency, self.temperature) if self.weighting == "activation" else None

    def top_k(self, client: Client, state: Bundle) -> int:
        """Return the K a client trains with."""
        native: int = state.meta["native_top_k"]
        return client.budget.top_k if self.active_experts == "budget" else native


def layout(model: FoundationModel) -> dict[str, Json]:
    """Return what a server's state remembers of the model. Activation counts have a row for each sparse layer."""
    return {
        "sparse_layers": [block.layer for block in model.blocks],
        "num_experts": model.num_experts,
        "native_top_k": model.native_top_k,
    }


def check_experts(model: FoundationModel, why: str) -> None:
    """Check that the model has experts. Raises: ConfigError saying that `why` needs them."""
    if not model.blocks:
        raise ConfigError(
            f"{why} needs a model with experts, but {model.family.model_type} models are dense; choose another "
            f"method or option (homolora, hetlora, flexlora and flora train dense models), or a sparse model"
        )


def check_options(model: FoundationModel, config: LoraMethodConfig) -> None:
    """Check that the model has what the options speak of. Raises: ConfigError."""
    if config.weighting == "activation":
        check_experts(model, "method.weighting activation")


def tier_ranks(budgets: Sequence[Budget], who: str) -> list[int]:
    """Return each budget's rank. Raises: ConfigError if a tier has none; `who` needs them."""
    missing = [budget.tier for budget in budgets if budget.rank is None]
    if missing:
        raise ConfigError(
            f"clients.tiers: {who} needs a LoRA rank for every tier, but {', '.join(map(repr, missing))} "
            f"{'has' if len(missing) == 1 else 'have'} none; add rank: to each"
        )
    return [budget.rank for budget in budgets if budget.rank is not None]


def check_rank(model: FoundationModel, adapter: lora.LoraConfig, rank: int, whose: str) -> None:
    """Check that a rank is not above the smallest adapted matrix. Raises: ConfigError."""
    for path, (*_, outputs, inputs) in sorted(lora.covered(model, adapter).items()):
        if rank > min(outputs, inputs):
            raise ConfigError(
                f"{whose} {rank} is above the size of {path!r}, {outputs} x {inputs}, whose rank is at most "
                f"{min(outputs, inputs)}; lower it"
            )


def initial(model: FoundationModel, adapter: lora.LoraConfig, rank: int, whose: str, seeds: Seeds) -> dict[str, Tensor]:
    """Return a LoRA of this rank that changes nothing: A random, B zero; or that of `adapter.start_from`.

    Raises: ConfigError if the rank is above a matrix's size, or as `lora.initial`.
    """
    check_rank(model, adapter, rank, whose)
    return lora.initial(model, adapter.model_copy(update={"rank": rank}), seeds.torch("adapter"))


def train(
    trainer: Trainer,
    model: FoundationModel,
    tensors: Mapping[str, Tensor],
    alpha: float,
    gate: GateOption,
    rescale: Rescale,
    download: Payload,
    shard: Shard,
    seeds: Seeds,
    penalty: Penalty | None = None,
) -> Bundle:
    """Train an adapter with the K of the download; return it with the counts, as the content of an upload.

    Raises: ClientError if training cannot go on.
    """
    top_k = download.content.meta["top_k"]
    with model.active_experts(top_k, gate, rescale), lora.attached(model, tensors, alpha) as adapter:
        stats = trainer.train(model, adapter, shard, download.client, download.round, seeds, penalty)
        trained = adapter.tensors()
    return federated.upload(trained, stats, shard, {"top_k": top_k})


@contextmanager
def deployed(
    model: FoundationModel,
    tensors: Mapping[str, Tensor],
    alpha: float,
    top_k: int,
    gate: GateOption,
    rescale: Rescale = "none",
) -> Iterator[FoundationModel]:
    """Run the model with an adapter and K active experts inside the context."""
    with model.active_experts(top_k, gate, rescale), lora.attached(model, tensors, alpha):
        yield model
