"""OLMo (https://arxiv.org/abs/2402.00838): dense, norms without weights."""

from emberfed.models.families import Family

FAMILY = Family(model_type="olmo")
