"""RoBERTa (https://arxiv.org/abs/1907.11692) with a head for classes of texts: BERT's layers, a head of two."""

from emberfed.models.families import ENCODER_LINEARS, Family

FAMILY = Family(
    model_type="roberta",
    task="text_classification",
    layers="roberta.encoder.layer",
    block="",
    ffn=("intermediate", "output.dense"),
    attention="attention",
    attention_linears=ENCODER_LINEARS,
    mlp_linears=("intermediate.dense", "output.dense"),
    head="classifier",
    embeddings=("roberta.embeddings",),
    positions="roberta.embeddings.position_embeddings",
)
