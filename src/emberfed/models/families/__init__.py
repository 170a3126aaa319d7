"""Model families: one file, one record. The file's name is the model type with which the record is found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, final

import torch
from torch import nn

from emberfed.errors import ModelError, closest

Task = Literal["generation", "text_classification", "image_classification"]
"""What a model of a family is for: the class of transformers it is loaded with, and what comes out of it."""


@final
@dataclass(frozen=True, slots=True)
class AttentionLinears:
    """The linear layers of an attention, by what they make. Each is a dotted path from the attention.

    Layers that make one thing are applied one after the other, as far as they are there. Where queries, keys and
    values are made by the same layers, they are parts of one output.

    Attributes:
        query: They make the queries.
        key: They make the keys.
        value: They make the values.
        output: It mixes what the heads give.
    """

    query: tuple[str, ...] = ("q_proj",)
    key: tuple[str, ...] = ("k_proj",)
    value: tuple[str, ...] = ("v_proj",)
    output: str = "o_proj"

    @staticmethod
    def fused(name: str, output: str) -> AttentionLinears:
        """Return those of an attention in which one layer makes queries, keys and values."""
        return AttentionLinears((name,), (name,), (name,), output)

    @property
    def all(self) -> tuple[str, ...]:
        """Every one of them once, in the order they are computed."""
        return tuple(dict.fromkeys((*self.query, *self.key, *self.value, self.output)))


GROUPED_QUERY_LINEARS = AttentionLinears()
"""Attention with a key and a value for each head or group of heads."""

LATENT_LINEARS = AttentionLinears(
    query=("q_proj", "q_a_proj", "q_b_proj"),
    key=("kv_a_proj_with_mqa", "kv_b_proj"),
    value=("kv_a_proj_with_mqa", "kv_b_proj"),
)
"""Multi-head latent attention (https://arxiv.org/abs/2405.04434); queries are compressed (q_a, q_b) or not (q)."""

ENCODER_LINEARS = AttentionLinears(("self.query",), ("self.key",), ("self.value",), "output.dense")
"""Attention of BERT and its kin."""

GATED_LINEARS = ("gate_proj", "up_proj", "down_proj")
"""An MLP whose activations are multiplied by a second projection."""


@final
@dataclass(frozen=True, slots=True)
class ImageInput:
    """How an image becomes positions. Its size is `image_size` in the config.

    Attributes:
        projection: From the model to the convolution that makes a position of each patch.
        special_positions: Positions before the patches: the class token, and others.
    """

    projection: str
    special_positions: int = 1


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
    """Where the parts of a model are, in transformers' implementation of it.

    Paths are dotted attribute names; an empty one stays where it is. A layer without router and experts is dense, also
    in a family with them.

    Attributes:
        model_type: transformers' name of the model type; the file's name too.
        task: What its models are for.
        layers: From the model to its list of layers.
        block: From a layer to its MLP, or to its mixture of experts.
        ffn: From a layer to the module whose first input is what the FFN computes from, and to the module whose output
            is what is added to the residual stream; None: both are `block`.
        attention: From a layer to its attention.
        attention_linears: Linear layers the attention may have; those that are there take LoRA.
        mlp_linears: From an MLP to its linear layers, which take LoRA. The last one is applied to the product of what
            the others give.
        mixture: Where the experts are; None for a dense family, which has none.
        head: From the model to what makes logits of classes; None where it generates.
        pooler: From the model to the frozen linear layer in front of the head, if there is one.
        fresh: From the model to what else checkpoints may lack: like a head it is then drawn.
        embeddings: From the model to its embeddings, where there are others than `get_input_embeddings` says.
        positions: From the model to the table of its positions' embeddings; None where any number of them goes.
        image: How an image becomes positions; None where the input is text.
        sizes: From the config to the part that says how large the layers are.
        parallel_residual: The config's attribute that says whether attention and MLP read the same input, if any does.
    """

    model_type: str
    task: Task = "generation"
    layers: str = "model.layers"
    block: str = "mlp"
    ffn: tuple[str, str] | None = None
    attention: str = "self_attn"
    attention_linears: AttentionLinears = GROUPED_QUERY_LINEARS
    mlp_linears: tuple[str, ...] = GATED_LINEARS
    mixture: Mixture | None = None
    head: str | None = None
    pooler: str | None = None
    fresh: str | None = None
    embeddings: tuple[str, ...] = ()
    positions: str | None = None
    image: ImageInput | None = None
    sizes: str = ""
    parallel_residual: str | None = None


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


def part(module: Any, path: str) -> Any:
    """Follow a dotted path from a module or config; None where it leads nowhere."""
    for name in path.split(".") if path else ():
        module = getattr(module, name, None)
    return module


def joined(*paths: str) -> str:
    """Join dotted paths, of which some may be empty."""
    return ".".join(path for path in paths if path)


def misfit(family: Family, what: str) -> ModelError:
    """Return the error for a model that is not built as its family's record says."""
    return ModelError(
        f"{what}: not a {family.model_type} model as emberfed/models/families/{family.model_type}.py describes it; "
        f"the versions of transformers and emberfed may not go together"
    )
