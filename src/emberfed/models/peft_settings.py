"""What PEFT's configuration of a LoRA says, checked: ranks, alphas, and which parameters are targets."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple, final

from peft.utils.other import get_pattern_key
from pydantic import ConfigDict, Field, field_validator

from emberfed.errors import ConfigError, ModelError
from emberfed.sections import Section, validate

Rank = Annotated[int, Field(ge=1, le=2**20)]
Alpha = Annotated[float, Field(gt=0, le=1e12)]


class Size(NamedTuple):
    """Rank, and the alpha with which alpha / rank is the scale."""

    rank: int
    alpha: float


@final
class PeftSettings(Section):
    """The settings that decide what the tensors mean, by PEFT's names.

    Attributes:
        peft_version: Of the PEFT that wrote them; None in files of very old ones.
        r: Rank where no pattern says another.
        lora_alpha: Alpha where no pattern says another.
        rank_pattern: Rank by regular expression of the module or parameter.
        alpha_pattern: Alpha likewise.
        target_parameters: Ends of the dotted paths of adapted parameters.
        use_rslora: Whether the scale is alpha / sqrt(r).
    """

    model_config = ConfigDict(strict=True)

    peft_version: str | None = None
    r: Rank
    lora_alpha: Alpha
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    target_parameters: list[str] | None = None
    use_rslora: bool = False

    @field_validator("rank_pattern", "alpha_pattern")
    @classmethod
    def _regular_expressions(cls, patterns: dict[str, Any] | None) -> dict[str, Any] | None:
        for pattern in patterns or {}:
            try:
                re.compile(_matched(pattern))
            except (re.error, RecursionError, OverflowError) as error:
                raise ValueError(f"{pattern[:80]!r} is not a regular expression ({error})") from None
        return patterns

    @staticmethod
    def parse(values: Mapping[str, Any]) -> PeftSettings:
        """Check PEFT's configuration; settings that do not matter here are not looked at. Raises: ModelError."""
        known = {name: value for name, value in values.items() if name in PeftSettings.model_fields}
        try:
            return validate(PeftSettings, known, "")
        except ConfigError as error:
            raise ModelError(str(error).removeprefix("'': ")) from None

    def targets(self, parameter: str) -> bool:
        """Return whether `target_parameters` names it, matched as PEFT does."""
        return any(f".{parameter}".endswith(f".{target}") for target in self.target_parameters or ())

    def size_of(self, target: str) -> Size:
        """Return rank and alpha PEFT gives to a module or parameter, by its own matching of patterns.

        Alpha is that with which alpha / R is the scale, also where the adapter is rank-stabilised (alpha / sqrt(R)).
        """
        ranks, alphas = self.rank_pattern or {}, self.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), target), self.r)
        alpha = alphas.get(get_pattern_key(list(alphas), target), self.lora_alpha)
        return Size(rank, alpha * math.sqrt(rank) if self.use_rslora else alpha)


def _matched(pattern: str) -> str:
    """Return the expression PEFT matches dotted paths with."""
    return rf"(.*\.)?({pattern})$"
