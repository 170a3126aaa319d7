"""Model families: one file, one record. The file's name is the model type with which the record is found."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Protocol, final

from emberfed.errors import ModelError, closest


@final
@dataclass(frozen=True, slots=True)
class Family:
    """Where the parts of a sparse mixture-of-experts model are, in transformers' implementation of it.

    Paths are dotted attribute names. A decoder layer without `block.router` is dense and gets no expert adapter.

    Attributes:
        model_type: transformers' name of the model type; the file's name too.
        layers: From the causal model to its list of decoder layers.
        block: From a decoder layer to its mixture of experts.
        router: From the block to the router, which returns (logits, weights, index).
        experts: From the block to the module with the stacked `gate_up_proj` (E, 2F, D) and `down_proj` (E, D, F).
        attention: From a decoder layer to its attention.
        attention_linears: The attention's linear layers that take LoRA.
        router_top_k: The router's attribute with the number of experts per token.
        top_k: The same on the causal model (for the auxiliary loss) and on its config.
        num_experts: The config's attribute with the number of experts.
        expert_intermediate: The config's attribute with F, the hidden size of one expert.
        renormalises: The config's attribute that says whether the weights of the kept experts are made to sum to 1,
            or the answer itself where the family has no choice.
    """

    model_type: str
    layers: str = "model.layers"
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    attention: str = "self_attn"
    attention_linears: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    router_top_k: str = "top_k"
    top_k: str = "num_experts_per_tok"
    num_experts: str = "num_experts"
    expert_intermediate: str = "intermediate_size"
    renormalises: str | bool = "norm_topk_prob"


class ModelTypeConfig(Protocol):
    """What `family_of` needs of a transformers config."""

    model_type: str


_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def families() -> tuple[str, ...]:
    """Return the model types that have a record, sorted."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


def load_family(model_type: str) -> Family:
    """Return the record of a model type. Raises: ModelError if there is none."""
    if model_type not in families():
        known = ", ".join(families())
        raise ModelError(
            f"model type {model_type!r} has no record; known: {known}{closest(model_type, families())}; to add it, "
            f"write emberfed/models/families/{model_type}.py with FAMILY = Family(...)"
        )
    family = importlib.import_module(f"{__name__}.{model_type}").FAMILY
    if not isinstance(family, Family):
        raise ModelError(f"emberfed/models/families/{model_type}.py must define FAMILY = Family(...)")
    return family


def family_of(config: ModelTypeConfig) -> Family:
    """Return the record for a transformers config. Raises: ModelError if the model is dense or of no known family."""
    if config.model_type not in families() and not any(getattr(config, name, None) for name in _EXPERT_COUNTS):
        raise ModelError(
            f"model type {config.model_type!r} is not a sparse mixture-of-experts model; "
            f"choose one of a known type: {', '.join(families())}"
        )
    return load_family(config.model_type)
