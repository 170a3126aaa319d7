"""Mistral 7B (https://arxiv.org/abs/2310.06825): dense, attention within a sliding window."""

from emberfed.models.families import Family

FAMILY = Family(model_type="mistral")
