"""What the methods with an adapter beside the FFN share: its layout, training with k active experts, deploying.

Free functions over the server's state, whose tensors named `layers.*` are the global adapter (`models.sparse_adapter`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from emberfed import federated
from emberfed.clients import Budget
from emberfed.data.shard import Shard
from emberfed.errors import ConfigError
from emberfed.models import sparse_adapter
from emberfed.models.adapter_layer import Activation
from emberfed.models.balance import NO_REGULARISER, Regulariser
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora_layout import layer_of
from emberfed.models.sparse_adapter_layout import is_expert, num_experts
from emberfed.records import Bundle, Json, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer


def layout(tensors: Mapping[str, Tensor]) -> dict[str, Json]:
    """Return what a server's state remembers of the adapter. Activation counts have a row for each of its layers."""
    layers = {layer_of(name) for name in tensors if is_expert(name)}
    experts = num_experts(tensors)
    return {"sparse_layers": sorted(layers), "num_experts": experts, "experts": "adapter.experts"}


def check_budgets(budgets: Sequence[Budget], experts: int, who: str) -> None:
    """Check that each budget has a k the adapter can have. Raises: ConfigError naming the first tier that does not."""
    for budget in budgets:
        if budget.adapter_top_k is None:
            raise ConfigError(
                f"clients.tiers: {who} needs adapter_top_k for every tier, the active experts of its adapter, but "
                f"{budget.tier!r} has none; add adapter_top_k: 1 to {experts}"
            )
        if budget.adapter_top_k > experts:
            raise ConfigError(
                f"clients.tiers: tier {budget.tier!r} has adapter_top_k {budget.adapter_top_k}, but the adapter has "
                f"{experts} experts (adapter.num_experts); choose 1 to {experts}"
            )


def train(
    trainer: Trainer,
    model: FoundationModel,
    tensors: Mapping[str, Tensor],
    activation: Activation,
    download: Payload,
    shard: Shard,
    seeds: Seeds,
    regulariser: Regulariser = NO_REGULARISER,
) -> Bundle:
    """Train an adapter with the K and k of the download; return it with the counts, as the content of an upload.

    Raises: ClientError if training cannot go on.
    """
    given = {key: download.content.meta[key] for key in ("top_k", "adapter_top_k")}
    attached = sparse_adapter.attached(model, tensors, given["adapter_top_k"], activation, regulariser)
    with model.active_experts(given["top_k"]), attached as adapter:
        stats = trainer.train(model, adapter, shard, download.client, download.round, seeds)
        trained = adapter.tensors()
    return federated.upload(trained, stats, shard, given)


@contextmanager
def deployed(
    model: FoundationModel, tensors: Mapping[str, Tensor], activation: Activation, top_k: int, adapter_top_k: int
) -> Iterator[FoundationModel]:
    """Run the model with K active experts, and an adapter with k, inside the context."""
    with model.active_experts(top_k), sparse_adapter.attached(model, tensors, adapter_top_k, activation):
        yield model


def largest(budgets: Sequence[Budget]) -> int:
    """Return the largest k of the budgets, at which an exported adapter runs where nothing else is asked for."""
    return max(budget.adapter_top_k or 1 for budget in budgets)
