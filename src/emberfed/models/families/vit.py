"""ViT (https://arxiv.org/abs/2010.11929) with a head for classes of images, on its class token."""

from emberfed.models.families import Family, ImageInput

FAMILY = Family(
    model_type="vit",
    task="image_classification",
    layers="vit.layers",
    attention="attention",
    mlp_linears=("fc1", "fc2"),
    head="classifier",
    embeddings=("vit.embeddings",),
    image=ImageInput("vit.embeddings.patch_embeddings.projection"),
)
