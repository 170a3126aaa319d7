"""DeepSeek-V3 and R1 (https://arxiv.org/abs/2412.19437): sigmoid scores, a bias that balances the choice of experts.

Experts are chosen by score plus bias, within the best groups; their weights are the scores without it.
"""

from emberfed.models.families import LATENT_LINEARS, Family, group_limit

FAMILY = Family(
    model_type="deepseek_v3",
    shared_experts="shared_experts",
    attention_linears=LATENT_LINEARS,
    num_experts="n_routed_experts",
    expert_intermediate="moe_intermediate_size",
    scaling="routed_scaling_factor",
    auxiliary_loss=False,
    groups=group_limit,
)
