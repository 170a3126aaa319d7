"""GPT-2 (https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf): dense.

One layer makes queries, keys and values. Its weights are stored transposed (`Conv1D`).
"""

from emberfed.models.families import AttentionLinears, Family

FAMILY = Family(
    model_type="gpt2",
    layers="transformer.h",
    attention="attn",
    attention_linears=AttentionLinears.fused("c_attn", "c_proj"),
    mlp_linears=("c_fc", "c_proj"),
    embeddings=("transformer.wte", "transformer.wpe"),
    positions="transformer.wpe",
)
