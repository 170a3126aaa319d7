"""Experts quantised while a checkpoint is read: each fused weight as soon as transformers has put it together.

This is a quantizer of transformers' own kind (`HfQuantizer`), so every family's conversion of a checkpoint's separate
experts into fused ones stays transformers' business. Beside what is quantised already, loading holds one fused weight
and the pieces it is made from.
"""

from __future__ import annotations

from typing import Any, ClassVar, final

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.quantizers.quantizers_utils import get_module_from_name
from transformers.utils.quantization_config import QuantizationConfigMixin

from emberfed.errors import ModelError
from emberfed.models.quantised import Bits, QuantisedWeight, default_group_size, replace, stacked_weights

_METHOD = "emberfed_experts"


@final
class ExpertQuantisation(QuantizationConfigMixin):  # type: ignore[misc]
    """What to give `from_pretrained` as `quantization_config`; the loaded model keeps no trace of it.

    Attributes:
        bits: Bits per expert weight.
    """

    def __init__(self, bits: Bits) -> None:
        """Ask for experts in that many bits."""
        self.quant_method: Any = _METHOD
        self.bits = bits


@final
class _QuantiseOnArrival(ConversionOps):  # type: ignore[misc]
    """Puts each fused weight into the model in fewer bits, and hands nothing on to transformers."""

    def __init__(self, bits: Bits, problems: list[str]) -> None:
        self._bits = bits
        self._problems = problems

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str], **_: Any
    ) -> dict[str, list[torch.Tensor]]:
        """Quantise all tensors of `input_dict`, by the names of the parameters they are for."""
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            missing_keys.discard(name)
            module, attribute = get_module_from_name(model, name)
            expected = getattr(module, attribute).shape
            # transformers would turn an exception into a table and a line that points to it; so problems are noted.
            if tensor.shape != expected:
                self._problems.append(f"weight {name!r} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")
                continue
            try:
                replace(module, attribute, QuantisedWeight.quantise(tensor, self._bits, name=f"weight {name!r}"))
            except ModelError as error:
                self._problems.append(str(error))
        return {}


@final
@register_quantizer(_METHOD)
class _ExpertQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantises the stacked weights of experts, nothing else. Raises ModelError without the model's path."""

    requires_calibration: ClassVar[bool] = False

    def __init__(self, quantization_config: ExpertQuantisation, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._bits = quantization_config.bits
        self._names: frozenset[str] = frozenset()
        self._problems: list[str] = []

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, module, attribute in stacked_weights(model):
            default_group_size(getattr(module, attribute).shape[2], f"weight {name!r}")
            module._is_hf_initialized = True  # type: ignore[assignment]  # else it draws values for what is no parameter
        self._names = frozenset(name for name, _, _ in stacked_weights(model))
        return model

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name in self._names

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantiseOnArrival(self._bits, self._problems)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self._problems:
            raise ModelError(self._problems[0])
        self.remove_quantization_config(model)
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
