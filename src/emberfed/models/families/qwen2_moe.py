"""Qwen1.5-MoE and Qwen2-MoE (https://arxiv.org/abs/2407.10671): 60 experts, top-4, and a gated shared expert."""

from emberfed.models.families import Family, Mixture

FAMILY = Family(
    model_type="qwen2_moe", mixture=Mixture(shared_experts="shared_expert", intermediate="moe_intermediate_size")
)
