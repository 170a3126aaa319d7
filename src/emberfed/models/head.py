"""What a model has that is trained in full rather than adapted: a classifier's head, and modules' weights in general.

An adapter's tensors of the head are called `head.<parameter>`, by the parameters of the module at `Family.head`:

    head.weight                (classes, D)     head.bias                (classes,)        most families
    head.dense.weight          (D, D)           head.dense.bias          (D,)              RoBERTa, besides
    head.out_proj.weight       (classes, D)     head.out_proj.bias       (classes,)

Shapes: D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from emberfed.models.foundation_model import FoundationModel

_PREFIX = "head."


def is_head(name: str) -> bool:
    """Return whether a canonical name is of a tensor of the head."""
    return name.startswith(_PREFIX)


def head_parameters(model: FoundationModel) -> dict[str, nn.Parameter]:
    """Return the parameters of the model's own head, by canonical name; empty where the model generates."""
    head = model.head
    return {} if head is None else {f"{_PREFIX}{name}": parameter for name, parameter in head.named_parameters()}


def initial_head(model: FoundationModel) -> dict[str, torch.Tensor]:
    """Return copies of the model's own head, float32 on the CPU, by sorted name; empty where the model generates."""
    found = head_parameters(model)
    return {name: found[name].detach().to("cpu", torch.float32, copy=True).contiguous() for name in sorted(found)}


@contextmanager
def attached_head(model: FoundationModel, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let the model compute with another head inside the context; on exit it is exactly as found.

    Args:
        model: The model.
        parameters: The whole head by canonical name, where the model is, float32; gradients go to these. Names that
            are not of the head are left alone, and without any the model's own head stays.
    """
    given = {name.removeprefix(_PREFIX): parameter for name, parameter in parameters.items() if is_head(name)}
    if not given or model.head is None:
        yield
        return
    with replaced(model.head, given):
        yield


@contextmanager
def replaced(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let a module and those inside it compute with other parameters; on exit it is exactly as found.

    Args:
        module: The module.
        parameters: One for each of its own, by their names.
    """
    with ExitStack() as stack:
        for path, inner in module.named_modules():
            start = f"{path}." if path else ""
            own = {name: parameters[f"{start}{name}"] for name, _ in inner.named_parameters(recurse=False)}
            if own:
                stack.enter_context(trained_in_full(inner, own))
        yield


@contextmanager
def trained_in_full(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Let a module compute with other parameters inside the context, cast to the types of its own.

    Args:
        module: The module.
        parameters: By the names of the module's own parameters they stand in for.
    """
    slots: Any = module._parameters  # the one way to put a computed tensor where a parameter is
    before = {name: slots[name] for name in parameters}

    def use_trained(_: nn.Module, __: Any) -> None:
        slots.update({name: value.to(before[name].dtype) for name, value in parameters.items()})

    hook = module.register_forward_pre_hook(use_trained)
    try:
        yield
    finally:
        hook.remove()
        slots.update(before)
