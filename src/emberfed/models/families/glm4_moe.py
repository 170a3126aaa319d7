"""GLM-4.5 (https://arxiv.org/abs/2508.06471): DeepSeek-V3's routing with ordinary grouped-query attention."""

from emberfed.models.families import Family, Mixture, group_limit

FAMILY = Family(
    model_type="glm4_moe",
    mixture=Mixture(
        shared_experts="shared_experts",
        num_experts="n_routed_experts",
        intermediate="moe_intermediate_size",
        scaling="routed_scaling_factor",
        auxiliary_loss=False,
        groups=group_limit,
    ),
)
