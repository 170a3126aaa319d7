"""Small real models for tests: random OLMoE models with a tokenizer, in memory or as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from emberfed.models.sparse_model import SparseModel

VOCABULARY = 64


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


def tiny_model(seed: int = 0, **overrides: Any) -> SparseModel:
    """Return `tiny_lm` as a `SparseModel`."""
    return SparseModel(tiny_lm(seed, **overrides))


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
