"""The sparse adapter: a mixture of small experts beside the FFN of a layer, dense or itself a mixture of experts.

y = FFN(x) + sum over the k best experts m of g_m(x) W_up_m act(W_down_m x), g the softmax of the k kept logits of the
adapter's own gate (FFT-MoE). With k = 1 that one weight is always 1, so the gate then learns from an auxiliary loss
only. What the tensors are called, and their shapes: `sparse_adapter_layout`.

Parameters of a layer: M * (2 * H * D + D), or 2 * H * D with one expert, which needs no gate.

Shapes: T tokens, K active experts, M experts, D hidden, H hidden size of an expert, L layers with adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Self, final

import psutil
import torch
from pydantic import Field, field_validator
from torch import nn

from emberfed.errors import ConfigError, ModelError
from emberfed.models import head as heads
from emberfed.models.adapter_layer import Activation
from emberfed.models.balance import NO_REGULARISER, GateRecord, Regulariser
from emberfed.models.counting import ActivationCounter
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.groups import ExpertViews, TrainableGroups
from emberfed.models.lora_layout import layer_of
from emberfed.models.padding import ModelInputs
from emberfed.models.routed_adapter import AdapterLayer, routed_adapter
from emberfed.models.sparse_adapter_layout import (
    Site,
    check,
    check_site,
    check_top_k,
    is_expert,
    num_experts,
    sizes,
)
from emberfed.models.trainable import Trainable
from emberfed.sections import Section

__all__ = [
    "SparseAdapter",
    "SparseAdapterConfig",
    "attached",
    "check",
    "check_top_k",
    "initial",
    "is_expert",
    "parameter_count",
]


_MARK = "emberfed_sparse_adapter"


class SparseAdapterConfig(Section):
    """The adapter's size, and where it stands.

    Attributes:
        num_experts: M. One is the dense adapter, which has no gate.
        expert_size: H, the hidden size of one expert.
        activation: What is between an expert's two matrices.
        layers: The layers it stands in, from 0; null is all.
        head: Train the classifier's head too, in full; null does where the model has one.
        router_std: Standard deviation of the gates' initial weights.
    """

    num_experts: int = Field(default=8, ge=1, le=4096)
    expert_size: int = Field(default=16, ge=1, le=65536)
    activation: Activation = "gelu"
    layers: tuple[int, ...] | None = None
    head: bool | None = None
    router_std: float = Field(default=0.02, gt=0, le=10)

    @field_validator("layers")
    @classmethod
    def _some_once(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and (not layers or len(set(layers)) < len(layers)):
            raise ValueError("layers must name at least one layer, each once; null is all")
        return layers

    def resolved(self, model: FoundationModel) -> Self:
        """Return the config with what null means for this model.

        Raises: ConfigError if it names layers or a head that the model does not have.
        """
        hosts = model.hosts()
        layers = tuple(sorted(hosts)) if self.layers is None else tuple(sorted(self.layers))
        missing = [str(layer) for layer in layers if layer not in hosts]
        if missing:
            raise ConfigError(
                f"adapter.layers names {', '.join(missing)}, but this {model.family.model_type} model has layers 0 to "
                f"{len(hosts) - 1}; choose among those"
            )
        if self.head and model.head is None:
            raise ConfigError(
                f"adapter.head is true, but this {model.family.model_type} model generates and has no head to train; "
                f"set adapter.head=false"
            )
        head = model.head is not None if self.head is None else self.head
        return self.model_copy(update={"layers": layers, "head": head})


def parameter_count(config: SparseAdapterConfig, model: FoundationModel) -> int:
    """Return how many numbers the adapter has in this model, its head included. Raises: ConfigError."""
    config = config.resolved(model)
    assert config.layers is not None
    layer = sum(map(math.prod, sizes(config.num_experts, config.expert_size, model.shape.hidden).values()))
    head = sum(parameter.numel() for parameter in heads.head_parameters(model).values()) if config.head else 0
    return len(config.layers) * layer + head


def initial(model: FoundationModel, config: SparseAdapterConfig, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return the adapter to begin with, float32 on the CPU, by sorted name.

    It does not change what the model computes: W_down is uniform in ±1/sqrt(D) as LoRA's A, W_up is zero, gates are
    normal, drawn in the order of the names; the head is a copy of the base's.

    Raises: ConfigError if the model lacks what the config names, or the adapter is larger than this machine's memory.
    """
    config = config.resolved(model)
    assert config.layers is not None
    _check_memory(parameter_count(config, model))
    hidden = model.shape.hidden
    shapes = {
        f"layers.{layer}.adapter.{tensor}": shape
        for layer in config.layers
        for tensor, shape in sizes(config.num_experts, config.expert_size, hidden).items()
    }
    tensors = heads.initial_head(model) if config.head else {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("down_proj"):
            bound = 1 / math.sqrt(hidden)
            tensors[name] = torch.empty(shape).uniform_(-bound, bound, generator=generator)
        elif name.endswith("up_proj"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = torch.empty(shape).normal_(0, config.router_std, generator=generator)
    return dict(sorted(tensors.items()))


def _check_memory(numbers: int) -> None:
    needed_bytes, memory_bytes = 4 * numbers, psutil.virtual_memory().total
    if needed_bytes > memory_bytes:
        raise ConfigError(
            f"adapter.num_experts and adapter.expert_size make an adapter of {needed_bytes / 1e9:,.0f} GB, but this "
            f"machine has {memory_bytes / 1e9:,.0f} GB of memory; lower them"
        )


@final
class SparseAdapter(Trainable):
    """A sparse adapter attached to a model.

    Attributes:
        parameters: What the model computes with: float32, by sorted canonical name.
        layers: The layers it stands in, ascending: the rows of activation counts and loads.
        num_experts: M.
        top_k: K.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        top_k: int,
        activation: Activation,
        regulariser: Regulariser,
        site: Site,
    ) -> None:
        """Hold the parameters; `attached` puts them to work."""
        self.parameters = dict(sorted(parameters.items()))
        self.layers = tuple(sorted({layer_of(name) for name in parameters if not heads.is_head(name)}))
        self.num_experts = num_experts(parameters)
        self.top_k = top_k
        self._activation = activation
        self._regulariser = regulariser
        self._site = site
        self._counters: list[ActivationCounter] = []
        self._records: dict[int, GateRecord] = {}

    def trainable_groups(self) -> TrainableGroups:
        """Return the parameters as an optimiser should see them: expert tensors split into one view per expert."""
        return TrainableGroups(
            dense={name: value for name, value in self.parameters.items() if not is_expert(name)},
            experts=tuple(
                ExpertViews.of(name, value, self.layers.index(layer_of(name)))
                for name, value in self.parameters.items()
                if is_expert(name)
            ),
        )

    @contextmanager
    def counting(self) -> Iterator[ActivationCounter]:
        """Count the adapter's experts that real tokens are sent to inside the context; rows are `layers`.

        Padding is read from the `attention_mask` of each forward pass; a layer counts once per pass, so gradient
        checkpointing does not count twice.
        """
        counter = ActivationCounter(len(self.layers), self.num_experts, self._site.device)
        inputs = ModelInputs(self._site.base)

        def begin(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            counter.begin(inputs.mask(args, kwargs))

        hook = self._site.base.register_forward_pre_hook(begin, with_kwargs=True)
        self._counters.append(counter)
        try:
            yield counter
        finally:
            self._counters.remove(counter)
            hook.remove()

    def auxiliary_loss(self) -> torch.Tensor | None:
        """Return the weighted loss of the last forward pass, a scalar with gradient; None if it has no coefficient.

        Raises: ValueError if there was no forward pass with gradients.
        """
        if not self._regulariser.is_active:
            return None
        if len(self._records) < len(self.layers):
            raise ValueError("auxiliary_loss needs a whole forward pass with gradients before it")
        return self._regulariser.loss([self._records[row] for row in range(len(self.layers))])

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the model compute with it inside the context. Raises: ModelError if it has another one already."""
        base: Any = self._site.base
        if hasattr(base, _MARK):
            raise ModelError("the model has a sparse adapter already, and takes one at a time; remove that first")
        with ExitStack() as stack:
            setattr(base, _MARK, self)
            stack.callback(delattr, base, _MARK)
            head = {name.removeprefix("head."): value for name, value in self.parameters.items() if heads.is_head(name)}
            if head and self._site.head is not None:
                stack.enter_context(heads.replaced(self._site.head, head))
            stack.callback(base.register_forward_pre_hook(self._begin).remove)
            for row, layer in enumerate(self.layers):
                host, beside = self._site.hosts[layer], _Beside(partial(self._added, row, self._layer(layer)))
                stack.callback(host.source.register_forward_pre_hook(beside.take).remove)
                stack.callback(host.target.register_forward_hook(beside.add).remove)
            stack.callback(self._records.clear)
            yield

    def _layer(self, layer: int) -> AdapterLayer:
        start = f"layers.{layer}.adapter"
        return AdapterLayer(
            self.parameters[f"{start}.experts.down_proj"],
            self.parameters[f"{start}.experts.up_proj"],
            self.parameters.get(f"{start}.router.weight"),
            self._activation,
        )

    def _begin(self, *_: Any) -> None:
        self._records.clear()

    def _added(self, row: int, layer: AdapterLayer, x_BSD: torch.Tensor, output_BSD: torch.Tensor) -> torch.Tensor:
        padding_T1 = self._site.padding.now
        routed = routed_adapter(layer, x_BSD.reshape(-1, x_BSD.shape[-1]), self.top_k, padding_T1)
        for counter in self._counters:
            counter.add(row, routed.index_TK)
        # Gradient checkpointing runs layers again in backward: what was recorded first stays.
        recording = self._regulariser.is_active and torch.is_grad_enabled() and row not in self._records
        if recording and routed.logits_TM is not None:
            real_T = None if padding_T1 is None else ~padding_T1[:, 0]
            self._records[row] = GateRecord(routed.logits_TM, routed.index_TK, real_T)
        out_BSD: torch.Tensor = routed.out_TD.view_as(output_BSD).to(output_BSD.dtype)
        return output_BSD + out_BSD


@final
class _Beside:
    """The two hooks of one host."""

    def __init__(self, added: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        """Take what makes the host's new output of its input and output."""
        self._added = added
        self._x_BSD: torch.Tensor | None = None

    def take(self, _: nn.Module, args: tuple[Any, ...]) -> None:
        """Remember what the FFN computes from."""
        self._x_BSD = args[0]

    def add(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """Add to the FFN's output, which may be the first of several things."""
        x_BSD, self._x_BSD = self._x_BSD, None
        assert x_BSD is not None, "the host's source runs before its target"
        if isinstance(output, tuple):
            return self._added(x_BSD, output[0]), *output[1:]
        return self._added(x_BSD, output)


@contextmanager
def attached(
    model: FoundationModel,
    tensors: Mapping[str, torch.Tensor],
    top_k: int,
    activation: Activation = "gelu",
    regulariser: Regulariser = NO_REGULARISER,
) -> Iterator[SparseAdapter]:
    """Run the model with an adapter inside the context; on exit the model is exactly as found, also after exceptions.

    Args:
        model: The model; its own weights stay frozen and untouched.
        tensors: The adapter; copied, never aliased. An empty one attaches nothing.
        top_k: K, from 1 to M.
        activation: What is between an expert's two matrices.
        regulariser: What `auxiliary_loss` of the adapter gives.

    Raises: ModelError if the adapter does not fit (see `check`) or the model has one already; ConfigError if K or the
    regulariser do not fit.
    """
    with attached_at(Site.of(model), tensors, top_k, activation, regulariser) as adapter:
        yield adapter


@contextmanager
def attached_at(
    site: Site,
    tensors: Mapping[str, torch.Tensor],
    top_k: int,
    activation: Activation,
    regulariser: Regulariser = NO_REGULARISER,
) -> Iterator[SparseAdapter]:
    """Attach as `attached` does, to any transformers model. Raises: as `attached`."""
    check_site(site, tensors)
    check_top_k(top_k, tensors)
    parameters = {
        name: nn.Parameter(tensor.detach().to(site.device, torch.float32, copy=True).contiguous())
        for name, tensor in tensors.items()
    }
    adapter = SparseAdapter(parameters, top_k, activation, regulariser, site)
    _check_regulariser(adapter, regulariser)
    with adapter.at_work():
        yield adapter


def _check_regulariser(adapter: SparseAdapter, regulariser: Regulariser) -> None:
    """Check that there are gates to regularise, and weights for each expert. Raises: ConfigError."""
    if regulariser.is_active and not any(name.endswith(".router.weight") for name in adapter.parameters):
        raise ConfigError(
            "an auxiliary loss balances the experts of a gate, but this sparse adapter has one expert in a layer and "
            "no gate; use no auxiliary loss, or more experts"
        )
    expected = (len(adapter.layers), adapter.num_experts)
    if regulariser.omega_LM is not None and tuple(regulariser.omega_LM.shape) != expected:
        raise ConfigError(
            f"the auxiliary loss has weights of shape {tuple(regulariser.omega_LM.shape)} for the experts; expected "
            f"{expected}, layers of the adapter by experts"
        )
