"""FlexOlmo (https://arxiv.org/abs/2507.07024): OLMoE's routing over experts that were trained apart from each other."""

from emberfed.models.families import Family, Mixture

FAMILY = Family(model_type="flex_olmo", mixture=Mixture())
