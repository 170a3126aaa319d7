"""OLMoE (https://arxiv.org/abs/2409.02060): 64 experts, top-8, softmax over all experts without renormalisation."""

from emberfed.models.families import Family, Mixture

FAMILY = Family(model_type="olmoe", mixture=Mixture())
