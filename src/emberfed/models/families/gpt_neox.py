"""GPT-NeoX and Pythia (https://arxiv.org/abs/2204.06745, https://arxiv.org/abs/2304.01373): dense.

One layer makes queries, keys and values; attention and MLP mostly read the same input.
"""

from emberfed.models.families import AttentionLinears, Family

FAMILY = Family(
    model_type="gpt_neox",
    layers="gpt_neox.layers",
    attention="attention",
    attention_linears=AttentionLinears.fused("query_key_value", "dense"),
    mlp_linears=("dense_h_to_4h", "dense_4h_to_h"),
    parallel_residual="use_parallel_residual",
)
