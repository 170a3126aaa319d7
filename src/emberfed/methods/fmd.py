"""FMD, a baseline of FLUX (https://arxiv.org/abs/2508.19078): all experts are tuned, off-loaded to the client's disk.

A client with too little memory keeps every expert on its disk and reads it whenever tokens go to it, forward and again
backward. Nothing is lost but time: the result is that of FedIT on the same LoRA, to the bit.

The paper's FMD tunes the weights themselves; here it tunes their LoRA, whose moments stay in memory, since weights that
are written back at every step with two moments each would make it six times slower still.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from emberfed import federated_lora
from emberfed.averaged_lora import AveragedLora, AveragedLoraConfig
from emberfed.clients import Budget
from emberfed.errors import ConfigError
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import OffloadedWeight


class FmdConfig(AveragedLoraConfig):
    """Options of FMD: those of every averaged LoRA."""


@final
class Fmd(AveragedLora):
    """LoRA on all experts, which stay on disk."""

    title = "FMD"
    paper = "Federated Fine-Tuning of Sparsely-Activated Large Language Models on Resource-Constrained Devices (FLUX)"
    Config = FmdConfig

    def rank(self, budgets: Sequence[Budget]) -> tuple[int, str]:
        """The adapter's."""
        return self.adapter.rank, "adapter.rank"

    def held(self, model: FoundationModel) -> FoundationModel:
        """The model, whose experts must be on disk."""
        federated_lora.check_experts(model, self.title)
        if not any(isinstance(module, OffloadedWeight) for module in model.lm.modules()):
            raise ConfigError(
                f"{self.title} trains experts that stay on disk, but this model's are in memory; set "
                f"model.expert_storage=disk"
            )
        return model
