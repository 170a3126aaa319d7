"""DeepSeek-V3 and R1 (https://arxiv.org/abs/2412.19437): sigmoid scores, a bias that balances the choice of experts.

Experts are chosen by score plus bias, within the best groups; their weights are the scores without it.
"""

from emberfed.models.families import LATENT_LINEARS, Family, Mixture, group_limit

FAMILY = Family(
    model_type="deepseek_v3",
    attention_linears=LATENT_LINEARS,
    mixture=Mixture(
        shared_experts="shared_experts",
        num_experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        scaling="routed_scaling_factor",
        auxiliary_loss=False,
        groups=group_limit,
    ),
)
