"""Mixtral (https://arxiv.org/abs/2401.04088): 8 experts, top-2, softmax over the kept experts.

Also the architecture of dense LLaMA models made sparse.
"""

from emberfed.models.families import Family, Mixture

FAMILY = Family(model_type="mixtral", mixture=Mixture(num_experts="num_local_experts", renormalises=True))
