"""OLMo 2 (https://arxiv.org/abs/2501.00656): dense, norms behind attention and MLP, queries and keys normalised."""

from emberfed.models.families import Family

FAMILY = Family(model_type="olmo2")
