"""FMQ, a baseline of FLUX (https://arxiv.org/abs/2508.19078): all experts are tuned, on a base in few bits.

Clients hold the experts in 4 bits and train a LoRA on them, as QLoRA does; the server averages it (FedIT). The global
model that is evaluated is the base as it was loaded, with that LoRA: what quantisation costs in training is seen, what
it would cost in use is not. With `model.expert_bits: 4` the base itself is in 4 bits, and both are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, final

from emberfed import federated_lora
from emberfed.averaged_lora import AveragedLora, AveragedLoraConfig
from emberfed.clients import Budget, Client
from emberfed.method import Held
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.low_bit_copies import LowBitCopies
from emberfed.records import Payload
from emberfed.training import Trainer


class FmqConfig(AveragedLoraConfig):
    """Options of FMQ.

    Attributes:
        bits: Bits of an expert's weights while clients train.
    """

    bits: Literal[4, 8] = 4


@final
class Fmq(AveragedLora):
    """LoRA on all experts, which are held in few bits."""

    title = "FMQ"
    paper = "Federated Fine-Tuning of Sparsely-Activated Large Language Models on Resource-Constrained Devices (FLUX)"
    Config = FmqConfig

    def __init__(self, config: Any, adapter: Any, trainer: Trainer) -> None:
        """Begin without a copy of the model."""
        super().__init__(config, adapter, trainer)
        self._copies = LowBitCopies()

    def rank(self, budgets: Sequence[Budget]) -> tuple[int, str]:
        """The adapter's."""
        return self.adapter.rank, "adapter.rank"

    def check_held(self, model: FoundationModel, budgets: Sequence[Budget]) -> None:
        """The model must have experts, and these must go into few bits."""
        federated_lora.check_experts(model, self.title)
        self._copies.of(model, self.config.bits)

    @contextmanager
    def held(self, model: FoundationModel, download: Payload, client: Client) -> Iterator[Held]:
        """The model with its experts in few bits."""
        copy = self._copies.of(model, self.config.bits)
        with copy.active_experts(download.content.meta["top_k"]):
            yield Held(copy)
