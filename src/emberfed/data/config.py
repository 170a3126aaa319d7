"""The `data` section."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from emberfed.sections import Section

Format = Literal["auto", "alpaca", "dolly", "sharegpt", "messages", "prompt_completion", "question_answer"]
Template = Literal["alpaca", "short", "chat"]


class IidPartition(Section):
    """Equal random shares."""

    kind: Literal["iid"] = "iid"


class DirichletPartition(Section):
    """Label skew: each value's examples are divided by a draw from a symmetric Dirichlet distribution.

    Attributes:
        by: Column whose values are skewed.
        alpha: Concentration; small is skewed, large is even.
        min_examples: Every client gets at least this many; draws that give less are repeated.
    """

    kind: Literal["dirichlet"]
    by: str = "category"
    alpha: float = Field(gt=0, le=1e6)
    min_examples: int = Field(2, ge=1)


class LabelPartition(Section):
    """Pathological: each client holds only some labels, and every label is with about as many clients as the others.

    Attributes:
        by: Column of the labels.
        labels_per_client: How many of them each client holds, exactly.
    """

    kind: Literal["label"]
    by: str = "category"
    labels_per_client: int = Field(ge=1)


class NaturalPartition(Section):
    """One client per value of a column (the clients the data really came from); `clients.count` is their number.

    Attributes:
        by: Column with the client's name. A folder of files without that column has one: each file is a client.
    """

    kind: Literal["natural"]
    by: str = "client"


class SizePartition(Section):
    """Random shares of different sizes.

    Attributes:
        sizes: How sizes grow with the client's number.
    """

    kind: Literal["size"]
    sizes: Literal["linear", "square", "exponential"] = "linear"


PartitionConfig = Annotated[
    IidPartition | DirichletPartition | LabelPartition | NaturalPartition | SizePartition, Field(discriminator="kind")
]


class DataConfig(Section):
    """What is trained on.

    Attributes:
        path: `builtin`, a hub id, a local file (.json, .jsonl, .parquet, .csv), a folder of such files, or a folder
            that `Dataset.save_to_disk` wrote.
        split: Split of a hub data set, or of a folder whose file names begin with their split. A folder with
            `local_training_<i>.json` is Shepherd's: for `train` only those are read.
        format: Shape of the records; `auto` recognises it from their columns.
        limit: Examples kept at most (held-out ones included), chosen at random by the seed; null: all.
        test_size: Examples held out for evaluation, before the rest is divided over clients.
        template: How a prompt is written: `alpaca`, `short` (alpaca's without its opening paragraph), or `chat` (the
            tokenizer's own chat template).
        max_length: Tokens of prompt and response together; longer examples are cut, see `data.tokenise`.
        partition: How the training examples are divided over clients.
    """

    path: str = Field("builtin", min_length=1)
    split: str = "train"
    format: Format = "auto"
    limit: int | None = Field(None, ge=2)
    test_size: int = Field(96, ge=1)
    template: Template = "alpaca"
    max_length: int = Field(512, ge=8)
    partition: PartitionConfig = Field(default_factory=IidPartition)
