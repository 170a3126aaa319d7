"""DeepSeek-V2 (https://arxiv.org/abs/2405.04434): shared experts, latent attention, routing within groups of experts.

transformers' router scales its weights and never renormalises them, whatever `norm_topk_prob` says.
"""

from typing import Any

from emberfed.models.families import LATENT_LINEARS, Family, GroupLimit, Mixture, group_limit


def _groups(config: Any) -> GroupLimit | None:
    return group_limit(config) if config.topk_method == "group_limited_greedy" else None


FAMILY = Family(
    model_type="deepseek_v2",
    attention_linears=LATENT_LINEARS,
    mixture=Mixture(
        shared_experts="shared_experts",
        num_experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        renormalises=False,
        scaling="routed_scaling_factor",
        auxiliary_loss=False,
        groups=_groups,
    ),
)
