"""Small real models for tests: random models of every family, with a tokenizer, in memory or as a folder."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora import LoraConfig

VOCABULARY = 64

_COMMON = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_DENSE_FIRST = {"num_hidden_layers": 3, "intermediate_size": 24, "moe_intermediate_size": 16}
"""Three layers of which the first has no experts; routed experts smaller than the dense MLP."""
_LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "num_key_value_heads": 4}
_DEEPSEEK_V2 = _LATENT | {"n_routed_experts": 8, "n_shared_experts": 2, "moe_intermediate_size": 16, "q_lora_rank": 12}
_DEEPSEEK_V3 = (
    _DENSE_FIRST
    | _LATENT
    | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 12}
    | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
)
_QWEN2 = {"num_experts": 8, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 20}
_GLM4 = _DENSE_FIRST | {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_ERNIE = _DENSE_FIRST | {"moe_num_experts": 8, "moe_num_shared_experts": 2, "moe_layer_start_index": 1}

_TINY_DENSE: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "llama-biased": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8, "head_dim": 12},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "gpt2": {"n_inner": 48},
    "gpt_neox": {"intermediate_size": 48},
    "gpt_neox-serial": {"intermediate_size": 48, "use_parallel_residual": False},
}

_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_PIXELS = {"image_size": 8, "patch_size": 4, "num_channels": 3}

_TINY_CLASSIFIERS: Mapping[str, Mapping[str, Any]] = {
    "bert": _COMMON | {"intermediate_size": 48},
    "roberta": _COMMON | {"intermediate_size": 48, "max_position_embeddings": 130},
    "vit": _VISION | _PIXELS,
    "vit-unbiased": _VISION | _PIXELS | {"qkv_bias": False, "hidden_act": "relu"},
    "deit": _VISION | _PIXELS | {"architectures": ["DeiTForImageClassification"]},
    "clip": {"vision_config": _VISION | _PIXELS},
}
CLASSES = ("cat", "dog", "emu", "fox", "gnu")
"""What tiny classifiers tell apart."""

_TINY_SPARSE: Mapping[str, Mapping[str, Any]] = {
    "olmoe": {"num_experts": 8},
    "olmoe-renormalised": {"num_experts": 8, "norm_topk_prob": True, "tie_word_embeddings": True},
    "flex_olmo": {"num_experts": 8},
    "flex_olmo-three": {"num_experts": 6, "num_experts_per_tok": 3},
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": _QWEN2,
    "qwen2_moe-dense_layer": _QWEN2
    | {"num_hidden_layers": 3, "mlp_only_layers": [1], "norm_topk_prob": True, "intermediate_size": 24},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 16, "norm_topk_prob": True, "head_dim": 12},
    "qwen3_moe-every_second": {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "decoder_sparse_step": 2},
    "deepseek_v2": _DEEPSEEK_V2,
    "deepseek_v2-grouped": _DEEPSEEK_V2
    | {"q_lora_rank": None, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    | {"routed_scaling_factor": 1.5, "first_k_dense_replace": 1, "intermediate_size": 24},
    "deepseek_v3": _DEEPSEEK_V3,
    "deepseek_v3-plain": _DEEPSEEK_V3 | {"norm_topk_prob": False, "q_lora_rank": None},
    "granitemoe": {"num_local_experts": 8, "embedding_multiplier": 2.0, "residual_multiplier": 0.5},
    "gpt_oss": {
        "num_local_experts": 8,
        "head_dim": 8,
        "sliding_window": 8,
        "swiglu_limit": 1.0,
        "rope_parameters": _YARN,
    },
    "phimoe": {"num_local_experts": 8, "router_jitter_noise": 0.1},
    "ernie4_5_moe": _ERNIE,
    "ernie4_5_moe-unshared": _ERNIE | {"moe_num_shared_experts": 0, "use_bias": True},
    "glm4_moe": _GLM4 | {"use_qk_norm": True},
    "glm4_moe-plain": _GLM4 | {"norm_topk_prob": False, "routed_scaling_factor": 2.0, "attention_bias": True},
}


def _variants(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    families = dict.fromkeys(name.partition("-")[0] for name in names)
    return {family: tuple(name for name in names if name.partition("-")[0] == family) for family in families}


SPARSE_VARIANTS: Mapping[str, tuple[str, ...]] = _variants(_TINY_SPARSE)
DENSE_VARIANTS: Mapping[str, tuple[str, ...]] = _variants(_TINY_DENSE)
CLASSIFIER_VARIANTS: Mapping[str, tuple[str, ...]] = _variants(_TINY_CLASSIFIERS)
FAMILY_VARIANTS: Mapping[str, tuple[str, ...]] = {**SPARSE_VARIANTS, **DENSE_VARIANTS}
"""Names `tiny_family_lm` takes of families that generate, by family; the first is the family's own name."""


def tiny_family_lm(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Return a tiny random model of a family or variant: hidden 32, 64 tokens; if sparse, 6 or 8 experts, K of 2 or 3.

    Classifiers tell `CLASSES` apart; those of images take 3 x 8 x 8 pixels in 4 patches. Every weight is random and
    loud, biases, norms and the correction of routing scores too, so that routing is uneven.
    """
    family = name.partition("-")[0]
    if name in _TINY_CLASSIFIERS:
        sizes = {**_TINY_CLASSIFIERS[name], "id2label": dict(enumerate(CLASSES))}
        auto: Any = AutoModelForSequenceClassification if "vocab_size" in sizes else AutoModelForImageClassification
    else:
        known = _TINY_DENSE[name] if name in _TINY_DENSE else {"num_experts_per_tok": 2, **_TINY_SPARSE[name]}
        sizes, auto = _COMMON | dict(known), AutoModelForCausalLM
    config = AutoConfig.for_model(family, **sizes | overrides)
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global stream
        lm: PreTrainedModel = auto.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor_name, tensor in sorted([*lm.named_parameters(), *lm.named_buffers()]):
            drawn = torch.randn(tensor.shape, generator=generator)
            if tensor_name.endswith("e_score_correction_bias"):
                tensor.copy_(drawn * 0.1)
            elif tensor_name.endswith(".weight") and tensor.dim() == 1:  # norms
                tensor.copy_(1 + drawn * 0.1)
            elif "inv_freq" not in tensor_name and tensor.is_floating_point():  # positions are buffers too
                tensor.copy_(drawn * 0.2)
    return lm


def save_tiny_family(name: str, folder: Path) -> Path:
    """Write `tiny_family_lm` and its tokenizer to `folder`, and return it."""
    tiny_family_lm(name).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def whole_adapter(model: FoundationModel, rank: int = 3) -> LoraConfig:
    """Return a config that covers everything the model has, trained routers too."""
    return LoraConfig(
        rank=rank,
        router=not model.is_dense,
        shared_experts=bool(model.shared_linears()),
        dense_mlp=bool(model.mlp_linears()),
    )


def tiny_lm(seed: int = 0, **overrides: Any) -> OlmoeForCausalLM:
    """Return a random OLMoE: 2 layers, hidden 32, 8 experts of 16, top-2, 64 tokens; loud enough to route unevenly."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "norm_topk_prob": False,
    }
    with torch.random.fork_rng(devices=[]):  # transformers initialises from the global stream
        lm = OlmoeForCausalLM(OlmoeConfig(**(sizes | overrides))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(lm.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return lm


def tiny_model(seed: int = 0, **overrides: Any) -> FoundationModel:
    """Return `tiny_lm` as a `FoundationModel`."""
    return FoundationModel(tiny_lm(seed, **overrides))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of 64 whole words: <pad>, <eos>, <unk>, w3 ... w63."""
    words = ["<pad>", "<eos>", "<unk>", *(f"w{index}" for index in range(3, VOCABULARY))]
    tokenizer = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=128
    )


def save_tiny_model(folder: Path, **overrides: Any) -> Path:
    """Write `tiny_lm` and its tokenizer to `folder`, and return it."""
    tiny_lm(**overrides).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def token_ids(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    """Return random ids of real tokens, (batch, length)."""
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
