"""BERT (https://arxiv.org/abs/1810.04805) with a head for classes of texts: dense, norms behind the sums."""

from emberfed.models.families import ENCODER_LINEARS, Family

FAMILY = Family(
    model_type="bert",
    task="text_classification",
    layers="bert.encoder.layer",
    block="",
    ffn=("intermediate", "output.dense"),
    attention="attention",
    attention_linears=ENCODER_LINEARS,
    mlp_linears=("intermediate.dense", "output.dense"),
    head="classifier",
    pooler="bert.pooler.dense",
    fresh="bert.pooler",
    embeddings=("bert.embeddings",),
    positions="bert.embeddings.position_embeddings",
)
