"""Where an adapter can stand beside the FFN of a layer: what it computes from, and what its output is added to.

Shapes: B sequences, S positions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import nn

from emberfed.models.families import Family, joined, misfit, part


@final
@dataclass(frozen=True, slots=True, eq=False)
class Host:
    """The FFN of one layer, dense or a mixture of experts.

    Attributes:
        layer: Index of the layer.
        source: Its first positional input is what the FFN computes from, (B, S, D).
        target: Its output, or the first entry of it, is what the FFN adds to the residual stream, (B, S, D).
    """

    layer: int
    source: nn.Module
    target: nn.Module


def hosts_of(lm: Any, family: Family) -> Mapping[int, Host]:
    """Return the hosts of a transformers model, by the index of their layer.

    Raises: ModelError naming the part that is not where the family's record says.
    """
    source, target = (family.block, family.block) if family.ffn is None else family.ffn
    layers = part(lm, family.layers)
    if layers is None:
        raise misfit(family, f"the model has no {family.layers}")
    for number, layer in enumerate(layers):
        for path in (source, target):
            if part(layer, path) is None:
                raise misfit(family, f"the model has no {joined(family.layers, str(number), path)}")
    return {number: Host(number, part(layer, source), part(layer, target)) for number, layer in enumerate(layers)}
