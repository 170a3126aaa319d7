"""Qwen3-MoE (https://arxiv.org/abs/2505.09388): 128 experts, top-8, renormalised, no shared expert."""

from emberfed.models.families import Family, Mixture

FAMILY = Family(model_type="qwen3_moe", mixture=Mixture(intermediate="moe_intermediate_size"))
