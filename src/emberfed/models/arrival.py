"""What becomes of the experts while a checkpoint is read: each fused weight is put away as soon as it is whole.

This is a quantizer of transformers' own kind (`HfQuantizer`), so every family's conversion of a checkpoint's separate
experts into fused ones stays transformers' business. Beside what is put away already, loading holds one fused weight
and the pieces it is made from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar, final

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from emberfed.errors import EmberfedError, ModelError
from emberfed.models.freed_memory import return_freed_memory
from emberfed.models.offloaded import OffloadedWeight
from emberfed.models.quantised import Bits, QuantisedWeight, default_group_size
from emberfed.models.stacked import StackedWeight, replace, stacked_weights

_METHOD = "emberfed_experts"


class Keeping(ABC):
    """How fused expert weights are kept."""

    @abstractmethod
    def check(self, name: str, shape: torch.Size) -> None:
        """Check, before anything is read, that a weight can be kept so. Raises: ModelError."""

    @abstractmethod
    def keep(self, name: str, tensor: torch.Tensor) -> StackedWeight:
        """Return what is to stand in a weight's place. Raises: ModelError or StorageError."""


@final
class InBits(Keeping):
    """In memory, in fewer bits."""

    def __init__(self, bits: Bits) -> None:
        """Keep them in that many bits."""
        self._bits = bits

    def check(self, name: str, shape: torch.Size) -> None:
        """Check that the columns can be grouped. Raises: ModelError."""
        default_group_size(shape[2], name)

    def keep(self, name: str, tensor: torch.Tensor) -> StackedWeight:
        """Quantise it. Raises: ModelError if a value is not finite, or too large."""
        return QuantisedWeight.quantise(tensor, self._bits, name=name)


@final
class OnDisk(Keeping):
    """In files, as they are."""

    def check(self, name: str, shape: torch.Size) -> None:
        """Accept every weight."""

    def keep(self, name: str, tensor: torch.Tensor) -> StackedWeight:
        """Write it to a file. Raises: StorageError; ModelError if a value is not finite."""
        return OffloadedWeight.write(tensor, name)


@final
class ExpertArrival(QuantizationConfigMixin):  # type: ignore[misc]
    """What to give `from_pretrained` as `quantization_config`; the loaded model keeps no trace of it.

    Attributes:
        keeping: How experts are kept.
    """

    def __init__(self, keeping: Keeping) -> None:
        """Ask for experts to be kept so."""
        self.quant_method: Any = _METHOD
        self.keeping = keeping


@final
class _PutAway(ConversionOps):  # type: ignore[misc]
    """Puts each fused weight where it is kept, and hands nothing on to transformers."""

    def __init__(self, keeping: Keeping, problems: list[EmberfedError]) -> None:
        self._keeping = keeping
        self._problems = problems

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Put away all tensors of `input_dict`, by the names of the parameters they are for."""
        for name, value in input_dict.items():
            missing_keys.discard(name)
            # transformers would turn an exception into a table and a line that points to it; so it is noted.
            if not self._problems:
                try:
                    self._put_away(model, name, value[0] if isinstance(value, list) else value)
                except EmberfedError as error:
                    self._problems.append(error)
        return {}

    def _put_away(self, model: nn.Module, name: str, tensor: torch.Tensor) -> None:
        module, attribute = get_module_from_name(model, name)
        expected = getattr(module, attribute).shape
        if tensor.shape != expected:
            raise ModelError(f"weight {name!r} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")
        replace(module, attribute, self._keeping.keep(f"weight {name!r}", tensor))
        return_freed_memory()  # of the pieces, and of the weights before this one


@final
@register_quantizer(_METHOD)
class _ExpertQuantizer(HfQuantizer):  # type: ignore[misc]
    """Takes the stacked weights of experts, nothing else. Raises the first problem, without the model's path."""

    requires_calibration: ClassVar[bool] = False

    def __init__(self, quantization_config: ExpertArrival, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._keeping = quantization_config.keeping
        self._names: frozenset[str] = frozenset()
        self._problems: list[EmberfedError] = []

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module, attribute in stacked_weights(model):
            self._keeping.check(f"weight {name!r}", getattr(module, attribute).shape)
            module._is_hf_initialized = True  # type: ignore[assignment]  # else it draws values for what is no parameter
        self._names = frozenset(name for name, _, _ in stacked_weights(model))
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self._names

    def get_quantize_ops(self) -> ConversionOps:
        return _PutAway(self._keeping, self._problems)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._problems:
            raise self._problems[0]
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
