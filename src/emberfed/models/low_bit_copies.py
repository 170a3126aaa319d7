"""The copy in fewer bits of whatever model is in use, made when it is first wanted."""

from __future__ import annotations

from typing import final

from emberfed.models.foundation_model import FoundationModel
from emberfed.models.low_bits import low_bit_copy
from emberfed.models.quantised import Bits


@final
class LowBitCopies:
    """Holds the last copy made: a process works with one model at a time."""

    def __init__(self) -> None:
        """Nothing is copied yet."""
        self._of: tuple[FoundationModel, Bits] | None = None
        self._copy: FoundationModel | None = None

    def of(self, model: FoundationModel, bits: Bits) -> FoundationModel:
        """Return the model's copy; the first call must come while nothing is attached to the model.

        Raises: ModelError as `low_bit_copy`.
        """
        if self._copy is None or self._of is None or self._of[0] is not model or self._of[1] != bits:
            self._copy, self._of = low_bit_copy(model, bits), (model, bits)
        return self._copy
