"""Qwen1.5, Qwen2 and Qwen2.5 (https://arxiv.org/abs/2407.10671): dense, biases on queries, keys and values."""

from emberfed.models.families import Family

FAMILY = Family(model_type="qwen2")
