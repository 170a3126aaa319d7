"""FedIT / Homo-LoRA (Zhang et al., "Towards Building the Federated GPT", 2023): LoRA of one rank, averaged.

Every client trains the whole LoRA; the server averages A and B apart, each by the clients' numbers of examples
(`averaged_lora`). The mean of the products B A is not the product of the means: FlexLoRA and FLoRA mend that.

`rank: lowest` gives everybody the lowest rank of any tier (the Homo-LoRA of comparisons, which all clients can afford);
`rank: adapter` gives everybody `adapter.rank` (FedIT as published).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from emberfed import federated_lora
from emberfed.averaged_lora import AveragedLora, AveragedLoraConfig
from emberfed.clients import Budget
from emberfed.models.foundation_model import FoundationModel


class HomoLoraConfig(AveragedLoraConfig):
    """Options of Homo-LoRA.

    Attributes:
        rank: `lowest` of the tiers' ranks for everybody, or `adapter`: adapter.rank.
    """

    rank: Literal["lowest", "adapter"] = "lowest"


@final
class HomoLora(AveragedLora):
    """LoRA of one rank for everybody, averaged by data size."""

    title = "Homo-LoRA"
    paper = "Zhang et al.: Towards Building the Federated GPT: Federated Instruction Tuning (FedIT)"
    Config = HomoLoraConfig

    def rank(self, budgets: Sequence[Budget]) -> tuple[int, str]:
        """The lowest of the tiers', or the adapter's."""
        if self.config.rank == "adapter":
            return self.adapter.rank, "adapter.rank"
        who = "homolora with rank lowest (rank: adapter would take adapter.rank)"
        return min(federated_lora.tier_ranks(budgets, who)), "clients.tiers: the lowest rank"

    def check_held(self, model: FoundationModel, budgets: Sequence[Budget]) -> None:
        """Everybody holds the whole model."""
