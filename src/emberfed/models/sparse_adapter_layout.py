"""The sparse adapter's tensors: what they are called, what shapes they have in a model, and whether they fit it.

Names do not depend on transformers:

    layers.{l}.adapter.experts.down_proj    (M, H, D)    W_down
    layers.{l}.adapter.experts.up_proj      (M, D, H)    W_up
    layers.{l}.adapter.router.weight        (M, D)       the gate
    head.{parameter}                                     a classifier's head, trained in full (`models/head.py`)

M and H are the same in every layer. One expert needs no gate: without one every token goes to it with weight 1, which
is the dense adapter.

Shapes: M experts, D hidden, H hidden size of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn
from transformers import PreTrainedModel

from emberfed.errors import ConfigError, ModelError, closest
from emberfed.models import head as heads
from emberfed.models.families import Family, family_of, part
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.hosts import Host, hosts_of
from emberfed.models.padding import PaddingFilter

_EXPERTS = re.compile(r"layers\.\d+\.adapter\.experts\.(down_proj|up_proj)")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def sizes(num_experts: int, expert_size: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of one layer's tensors, by what follows `layers.{l}.adapter.`."""
    return {
        "experts.down_proj": (num_experts, expert_size, hidden),
        "experts.up_proj": (num_experts, hidden, expert_size),
        **({"router.weight": (num_experts, hidden)} if num_experts > 1 else {}),
    }


def is_expert(name: str) -> bool:
    """Return whether a canonical name is of a tensor of the sparse adapter that is stacked over experts."""
    return _EXPERTS.fullmatch(name) is not None


def num_experts(tensors: Mapping[str, torch.Tensor]) -> int:
    """Return M of an adapter; 1 where it has no layer, as a head alone."""
    return next((tensor.shape[0] for name, tensor in sorted(tensors.items()) if is_expert(name)), 1)


def check_top_k(top_k: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check K of an adapter. Raises: ConfigError if it is not from 1 to M."""
    experts = num_experts(tensors)
    if type(top_k) is not int or not 1 <= top_k <= experts:
        raise ConfigError(
            f"adapter_top_k {top_k!r} is impossible: the sparse adapter has {experts} experts in a layer; choose 1 to "
            f"{experts}"
        )


@final
@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """What the adapter needs of the model it is attached to.

    Attributes:
        family: The record that says where its parts are.
        hosts: Where an adapter can stand, by layer.
        head: What makes logits of classes, if the model has it.
        base: The module that is given `attention_mask`.
        padding: Which positions of the present forward pass are padding.
        device: Where the model is.
        hidden: D.
    """

    family: Family
    hosts: Mapping[int, Host]
    head: nn.Module | None
    base: nn.Module
    padding: PaddingFilter
    device: torch.device
    hidden: int

    @staticmethod
    def of(model: FoundationModel) -> Site:
        """Return that of one of ours."""
        return Site(
            model.family,
            model.hosts(),
            model.head,
            model.lm.base_model,
            model.padding,
            model.device,
            model.shape.hidden,
        )

    @staticmethod
    @contextmanager
    def of_transformers(lm: Any) -> Iterator[Site]:
        """Give that of a plain transformers model, whose padding is followed inside the context.

        Raises: ModelError if the model is of no known family, or not built as its family's record says.
        """
        if not isinstance(lm, PreTrainedModel):
            raise ModelError(f"a sparse adapter is loaded into a model of transformers, found {type(lm).__name__}")
        family = family_of(lm.config)
        hosts = hosts_of(lm, family)
        head = None if family.head is None else part(lm, family.head)
        padding = PaddingFilter(lm.base_model)
        try:
            hidden = part(lm.config, family.sizes).hidden_size
            yield Site(family, hosts, head, lm.base_model, padding, lm.device, hidden)
        finally:
            padding.remove()


def check(model: FoundationModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check that an adapter fits the model: whole layers, a whole head, nothing foreign, right shapes.

    Raises: ModelError naming the first tensor that is wrong, what it is and what was expected.
    """
    check_site(Site.of(model), tensors)


def check_site(site: Site, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check as `check` does. Raises: ModelError."""
    expected = _expected(site, tensors)
    for name, tensor in sorted(tensors.items()):
        if name not in expected:
            raise ModelError(
                f"adapter tensor {name!r} has no place in this {site.family.model_type} model"
                f"{closest(name, expected)}; layers with a place for adapters are {min(site.hosts)} to "
                f"{max(site.hosts)}"
            )
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise ModelError(f"adapter tensor {name!r} is {tensor.dtype}; expected one of {allowed}")
        if tuple(tensor.shape) != expected[name]:
            raise ModelError(
                f"adapter tensor {name!r} has shape {tuple(tensor.shape)}; expected {expected[name]} in this "
                f"{site.family.model_type} model of hidden size {site.hidden}"
            )
    parts = {name.partition(".adapter.")[0] for name in tensors if not heads.is_head(name)}
    has_head = any(map(heads.is_head, tensors))
    for name in expected:
        whole = has_head if heads.is_head(name) else name.partition(".adapter.")[0] in parts
        if whole and name not in tensors:
            raise ModelError(f"the adapter lacks {name!r}, which belongs to the others of its layer or head")


def _expected(site: Site, tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all tensors the model has a place for; M and H are those of the first layer there is."""
    down = next(
        (tensor for name, tensor in sorted(tensors.items()) if name.endswith(".adapter.experts.down_proj")), None
    )
    experts, size = (1, 1) if down is None or down.dim() != 3 or 0 in down.shape else down.shape[:2]
    layer = sizes(experts, size, site.hidden)
    own = {} if site.head is None else {f"head.{name}": tuple(p.shape) for name, p in site.head.named_parameters()}
    return {
        **{f"layers.{host}.adapter.{tensor}": shape for host in site.hosts for tensor, shape in layer.items()},
        **own,
    }
