"""The configuration section `model`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from emberfed.sections import Section


class ModelConfig(Section):
    """Which model to fine-tune and how to hold it.

    Attributes:
        path: A hub id, a local folder, or `builtin` for the small model of the task that comes with the package.
        weights: `checkpoint` reads them; `random` draws them, from a seed that is always the same, for the architecture
            that config.json describes.
        revision: Branch, tag or commit of a hub id; null is its default branch.
        tokenizer: Hub id or folder of the tokenizer; null is `path`.
        dtype: Number format of the frozen base; `auto` is the checkpoint's own. Adapters are float32 always.
        expert_bits: Bits per weight of the frozen experts, quantised as they are read (about 4.5 or 8.5 with their
            scales); null leaves them in `dtype`.
        expert_storage: `disk` writes the frozen experts to temporary files as they are read, in the folder that TMPDIR
            names, and reads an expert back whenever it is needed; `memory` holds all of them.
        device: `auto` is the first CUDA device where there is one, else the CPU.
        threads: CPU threads; null is torch's choice. On CPUs the bits of a result depend on their number, and a tiny
            model is no faster with many.
    """

    path: str = "builtin"
    weights: Literal["checkpoint", "random"] = "checkpoint"
    revision: str | None = None
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    expert_bits: Literal[4, 8] | None = None
    expert_storage: Literal["memory", "disk"] = "memory"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, le=1024)

    @model_validator(mode="after")
    def _either_bits_or_disk(self) -> Self:
        if self.expert_bits is not None and self.expert_storage == "disk":
            raise ValueError(
                f"expert_bits is {self.expert_bits}, but experts on disk (expert_storage: disk) stay in dtype; set "
                f"expert_bits to null, or expert_storage to memory"
            )
        return self
