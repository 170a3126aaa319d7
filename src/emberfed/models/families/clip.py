"""CLIP's vision transformer (https://arxiv.org/abs/2103.00020) with a head on the mean of its patches."""

from emberfed.models.families import AttentionLinears, Family, ImageInput

FAMILY = Family(
    model_type="clip",
    task="image_classification",
    layers="vision_model.encoder.layers",
    attention_linears=AttentionLinears(output="out_proj"),
    mlp_linears=("fc1", "fc2"),
    head="classifier",
    embeddings=("vision_model.embeddings",),
    image=ImageInput("vision_model.embeddings.patch_embedding"),
    sizes="vision_config",
)
