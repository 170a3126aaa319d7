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


class ShardsPartition(Section):
    """McMahan's pathological division: examples sorted by label are cut into equal pieces, dealt at random.

    A client holds about as many labels as pieces, and never more than one more for each piece. Source: McMahan et
    al. 2017, Communication-Efficient Learning of Deep Networks from Decentralized Data, section 3.

    Attributes:
        by: Column of the labels.
        shards_per_client: How many pieces each client gets.
    """

    kind: Literal["shards"]
    by: str = "category"
    shards_per_client: int = Field(2, ge=1)


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
    IidPartition | DirichletPartition | LabelPartition | ShardsPartition | NaturalPartition | SizePartition,
    Field(discriminator="kind"),
]


class CorpusConfig(Section):
    """What is trained on, whatever the task.

    Attributes:
        task: What the model learns to do; it decides which other keys there are.
        path: `builtin`, a hub id, a local file or folder.
        split: Split of a hub data set, or of a folder that has splits.
        limit: Examples kept at most (held-out ones included), chosen at random by the seed; null: all.
        test_size: Examples held out for evaluation, before the rest is divided over clients.
        client_test_share: Share of each client's examples that is kept for evaluating its own model, and not trained
            on; 0: none.
        partition: How the training examples are divided over clients.
    """

    task: str
    path: str = Field("builtin", min_length=1)
    split: str = "train"
    limit: int | None = Field(None, ge=2)
    test_size: int = Field(96, ge=1)
    client_test_share: float = Field(0.0, ge=0, le=0.5)
    partition: PartitionConfig = Field(default_factory=IidPartition)


class DataConfig(CorpusConfig):
    """Instructions and responses, for a model that generates text.

    `path` may be a local file (.json, .jsonl, .parquet, .csv), a folder of such files, or a folder that
    `Dataset.save_to_disk` wrote. A folder whose file names begin with their split has splits. A folder with
    `local_training_<i>.json` is Shepherd's: for `train` only those are read.

    Attributes:
        format: Shape of the records; `auto` recognises it from their columns.
        template: How a prompt is written: `alpaca`, `short` (alpaca's without its opening paragraph), or `chat` (the
            tokenizer's own chat template).
        max_length: Tokens of prompt and response together; longer examples are cut, see `data.tokenise`.
    """

    task: Literal["generation"] = "generation"
    format: Format = "auto"
    template: Template = "alpaca"
    max_length: int = Field(512, ge=8)


class ImageDataConfig(CorpusConfig):
    """Images with one class each.

    `path` may be a folder with a sub-folder of images for each class (or one with a folder for each split above
    those), a .parquet file, or a folder that `Dataset.save_to_disk` wrote.

    Attributes:
        image: Column of the images.
        label: Column of the classes, whole numbers or words.
    """

    task: Literal["image_classification"]
    test_size: int = Field(400, ge=1)
    image: str = Field("image", min_length=1)
    label: str = Field("label", min_length=1)


class TextClassDataConfig(CorpusConfig):
    """Texts with one class each. `path` may be what it may be for text that is generated.

    Attributes:
        text: Column of the texts.
        label: Column of the classes, whole numbers or words.
        max_length: Tokens of a text; longer ones are cut at their end.
    """

    task: Literal["text_classification"]
    text: str = Field("text", min_length=1)
    label: str = Field("label", min_length=1)
    max_length: int = Field(128, ge=4)
