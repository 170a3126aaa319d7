"""DeiT (https://arxiv.org/abs/2012.12877) with a head for classes of images, on its class token: ViT's layers."""

from emberfed.models.families import Family, ImageInput

FAMILY = Family(
    model_type="deit",
    task="image_classification",
    layers="deit.layers",
    attention="attention",
    mlp_linears=("fc1", "fc2"),
    head="classifier",
    embeddings=("deit.embeddings",),
    image=ImageInput("deit.embeddings.patch_embeddings.projection", special_positions=2),
)
