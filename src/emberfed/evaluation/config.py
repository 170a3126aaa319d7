"""The `evaluation` section."""

from __future__ import annotations

from pydantic import Field

from emberfed.sections import Section


class EvaluationConfig(Section):
    """When and how the global model is evaluated, at every tier's budget.

    Where `data.client_test_share` is above 0, each client's own model is evaluated at the same times, on the client, on
    the examples kept from training there.

    Attributes:
        every: Evaluate after every n-th round (and always before round 1 and after the last); 0: only those two.
        max_examples: Held-out examples used at most; null: all of `data.test_size`.
        batch_size: Examples per batch.
        max_new_tokens: Length at which an answer is cut. Of no effect where models choose a class.
        stemmer: Whether ROUGE stems words (Porter) first. Of no effect where models choose a class.
        tiers: Names of the tiers to evaluate at; null: all. For tiers that deploy the same model, one is enough.
    """

    every: int = Field(1, ge=0)
    max_examples: int | None = Field(None, ge=1)
    batch_size: int = Field(32, ge=1)
    max_new_tokens: int = Field(48, ge=1)
    stemmer: bool = False
    tiers: list[str] | None = Field(None, min_length=1)

    def includes(self, tier: str) -> bool:
        """Return whether a tier is evaluated."""
        return self.tiers is None or tier in self.tiers
