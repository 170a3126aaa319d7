"""GPT-OSS (https://arxiv.org/abs/2508.10925): softmax over the kept experts, biases everywhere, clamped activation.

Its experts are stored transposed, gate and up alternating.
"""

from emberfed.models.families import Family, Mixture

FAMILY = Family(
    model_type="gpt_oss", mixture=Mixture(router="router", num_experts="num_local_experts", renormalises=True)
)
