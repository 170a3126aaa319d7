"""LLaMA 1 to 3 (https://arxiv.org/abs/2302.13971, https://arxiv.org/abs/2407.21783): dense."""

from emberfed.models.families import Family

FAMILY = Family(model_type="llama")
