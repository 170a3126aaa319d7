"""Granite-3.0 MoE (https://github.com/ibm-granite/granite-3.0-language-models): softmax over the kept experts."""

from emberfed.models.families import Family, Mixture

FAMILY = Family(
    model_type="granitemoe",
    block="block_sparse_moe",
    mixture=Mixture(router="router", num_experts="num_local_experts", renormalises=True),
)
