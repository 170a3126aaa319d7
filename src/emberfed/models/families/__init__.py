"""Model families: one file, one record. The file's name is the model type with which the record is found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, final

import torch
from torch import nn

from emberfed.errors import ModelError, closest

GROUPED_QUERY_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Attention with a key and a value for each head or group of heads."""

LATENT_LINEARS = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
"""Multi-head latent attention (https://arxiv.org/abs/2405.04434); queries are compressed (q_a, q_b) or not (q)."""


@final
@dataclass(frozen=True, slots=True)
class GroupLimit:
    """Routing that first keeps some groups of experts for a token, and then experts of those groups only.

    Attributes:
        kept: Groups that stay.
        groups: Groups there are.
        group_size: Experts of one group.
    """

    kept: int
    groups: int
    group_size: int

    @property
    def largest_top_k(self) -> int:
        """The most experts a token can be sent to."""
        return self.kept * self.group_size


@final
@dataclass(frozen=True, slots=True)
class FixedRouting:
    """A router that picks the same number of experts whatever its `top_k` says.

    Attributes:
        top_k: How many it picks.
        route: What it would do at another K: from (logits (T, E), K, router) to weights (T, K) and experts (T, K).
    """

    top_k: int
    route: Callable[[torch.Tensor, int, nn.Module], tuple[torch.Tensor, torch.Tensor]]


def no_groups(_: Any) -> None:
    """Say that any experts of a layer can be active together."""


def group_limit(config: Any) -> GroupLimit:
    """Read `n_group` and `topk_group`, as the DeepSeek-V3 family names them.

    Raises: ModelError if they do not divide the experts, or keep more groups than there are.
    """
    experts, groups, kept = config.n_routed_experts, config.n_group, config.topk_group
    whole = all(isinstance(number, int) and number >= 1 for number in (experts, groups, kept))
    if not whole or experts % groups or kept > groups:
        raise ModelError(
            f"config.json says n_group {groups}, topk_group {kept} and n_routed_experts {experts}; expected n_group to "
            f"divide n_routed_experts, and topk_group from 1 to n_group"
        )
    return GroupLimit(kept, groups, experts // groups)


@final
@dataclass(frozen=True, slots=True)
class Mixture:
    """Where a family's experts are, and how its routers choose among them.

    How expert weights are stored is not said here: transformers' experts modules say it themselves.

    Attributes:
        router: From the block to the router, which returns (logits, weights, index).
        experts: From the block to the module with the stacked `gate_up_proj` and `down_proj`.
        shared_experts: From the block to the MLP every token goes through besides its experts, if the family has one.
        top_k: Experts per token: the config's attribute; also the causal model's, if its auxiliary loss reads one.
        router_top_k: The same on the router, and on the block if it has one of that name.
        num_experts: The config's attribute with the number of experts.
        intermediate: The config's attribute with F, the hidden size of one expert.
        renormalises: The config's attribute that says whether the weights of the kept experts are made to sum to a
            constant, or the answer itself where the family has no choice.
        scaling: The config's attribute with the factor the router puts on all weights, if it has one: what
            renormalised weights sum to. Elsewhere that is 1.
        auxiliary_loss: Whether the causal model computes a load-balancing loss.
        groups: From the config to the limit that groups of experts set.
        fixed: Set for a router that ignores its `top_k`.
    """

    router: str = "gate"
    experts: str = "experts"
    shared_experts: str | None = None
    top_k: str = "num_experts_per_tok"
    router_top_k: str = "top_k"
    num_experts: str = "num_experts"
    intermediate: str = "intermediate_size"
    renormalises: str | bool = "norm_topk_prob"
    scaling: str | None = None
    auxiliary_loss: bool = True
    groups: Callable[[Any], GroupLimit | None] = no_groups
    fixed: FixedRouting | None = None


@final
@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts of a causal language model are, in transformers' implementation of it.

    Paths are dotted attribute names. A decoder layer without router and experts is dense, also in a family with them.

    Attributes:
        model_type: transformers' name of the model type; the file's name too.
        layers: From the causal model to its list of decoder layers.
        block: From a decoder layer to its MLP (gate_proj, up_proj and down_proj), or to its mixture of experts.
        attention: From a decoder layer to its attention.
        attention_linears: Linear layers the attention may have; those that are there take LoRA.
        mixture: Where the experts are; None for a dense family, which has none.
    """

    model_type: str
    layers: str = "model.layers"
    block: str = "mlp"
    attention: str = "self_attn"
    attention_linears: tuple[str, ...] = GROUPED_QUERY_LINEARS
    mixture: Mixture | None = None


class ModelTypeConfig(Protocol):
    """What `family_of` needs of a transformers config."""

    model_type: str


def families() -> tuple[str, ...]:
    """Return the model types that have a record, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_family(model_type: str) -> Family:
    """Return the record of a model type. Raises: ModelError if there is none."""
    if model_type not in families():
        raise ModelError(
            f"model type {model_type!r} has no record{closest(model_type, families())}; {_how_to_add(model_type)}"
        )
    family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    if not isinstance(family, Family):
        raise ModelError(f"emberfed/models/families/{model_type}.py must define FAMILY = Family(...)")
    return family


def family_of(config: ModelTypeConfig) -> Family:
    """Return the record for a transformers config.

    Raises: ModelError if the model is of no known family; it says what the config tells about experts.
    """
    if config.model_type in families():
        return load_family(config.model_type)
    found = ", ".join(f"{name}={value}" for name, value in sorted(_expert_facts(config).items()))
    experts = f"its config has experts ({found})" if found else "its config says nothing of experts"
    raise ModelError(f"model type {config.model_type!r} has no record ({experts}); {_how_to_add(config.model_type)}")


def _how_to_add(model_type: str) -> str:
    return (
        f"known: {', '.join(families())}; to add it, write "
        f"emberfed/models/families/{model_type}.py with FAMILY = Family(model_type={model_type!r}, ...), "
        f"which says where its layers are, and its routers and experts if it has any"
    )


def _expert_facts(config: object, prefix: str = "") -> Mapping[str, int]:
    """Return the whole numbers above zero a config, or a config inside it, has under a name with `expert` in it."""
    facts: dict[str, int] = {}
    for name, value in vars(config).items():
        if "expert" in name and type(value) is int and value > 0:
            facts[f"{prefix}{name}"] = value
        elif hasattr(value, "model_type"):
            facts.update(_expert_facts(value, f"{prefix}{name}."))
    return facts
