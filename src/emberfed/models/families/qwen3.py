"""Qwen3 (https://arxiv.org/abs/2505.09388): dense, queries and keys normalised by head."""

from emberfed.models.families import Family

FAMILY = Family(model_type="qwen3")
