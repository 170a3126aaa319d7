"""FMD, a baseline of FLUX (https://arxiv.org/abs/2508.19078): all experts are tuned, off-loaded to the client's disk.

A client with too little memory keeps the experts on its disk and reads one whenever tokens go to it, forward and again
backward. Of a tier with `held_experts` it holds as many in memory, the first ones of each layer (the layers' shares
differ by one at most, earlier ones having more), and reads those once a round. Nothing is lost but time: the result is
that of FedIT on the same LoRA, to the bit.

The paper's FMD tunes the weights themselves; here it tunes their LoRA, whose moments stay in memory, since weights that
are written back at every step with two moments each would make it six times slower still.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import final

from emberfed import federated_experts, federated_lora
from emberfed.averaged_lora import AveragedLora, AveragedLoraConfig
from emberfed.clients import Budget, Client, largest_remainder
from emberfed.errors import ConfigError
from emberfed.method import Held
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import disk_bytes_read, is_offloaded
from emberfed.models.stacked import EXPERT_WEIGHTS
from emberfed.records import Payload


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

    def check_held(self, model: FoundationModel, budgets: Sequence[Budget]) -> None:
        """The model's experts must be on disk, and no tier can hold more of them than there are."""
        federated_lora.check_experts(model, self.title)
        if not is_offloaded(model.lm):
            raise ConfigError(
                f"{self.title} trains experts that stay on disk, but this model's are in memory; set "
                f"model.expert_storage=disk"
            )
        federated_experts.check_held(model, budgets)

    @contextmanager
    def held(self, model: FoundationModel, download: Payload, client: Client) -> Iterator[Held]:
        """The model with the experts in memory that there is room for."""
        layers, read_before = model.num_layers, disk_bytes_read(model.lm)
        shares = largest_remainder([1 / layers] * layers, client.budget.held_experts or 0)
        with model.active_experts(download.content.meta["top_k"]), ExitStack() as stack:
            for block, share in zip(model.blocks, shares, strict=True):
                for name in EXPERT_WEIGHTS:
                    stack.enter_context(getattr(block.experts, name).holding(range(share)))
            yield Held(model, disk_bytes=disk_bytes_read(model.lm) - read_before)
