"""Tiny dense models on disk, to be made sparse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from builders import VOCABULARY, tiny_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

NEURONS, HIDDEN = 64, 32
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def sizes(**overrides: Any) -> dict[str, Any]:
    """Settings of a tiny dense model: 2 layers, hidden 32, FFN of 64 neurons, 4 heads on 2 key-value heads."""
    plain = {
        "hidden_size": HIDDEN,
        "intermediate_size": NEURONS,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 128,
        "bos_token_id": None,
        "eos_token_id": [1, 2],
        "pad_token_id": 0,
    }
    return plain | overrides


def save_dense(folder: Path, lm: Any) -> Path:
    """Write a dense model with loud random weights and a tokenizer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(lm.named_parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + (parameter.dim() == 1))
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_llama(folder: Path, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Write a tiny LLaMA."""
    with torch.random.fork_rng(devices=[]):
        return save_dense(folder, LlamaForCausalLM(LlamaConfig(**sizes(**overrides))).to(dtype))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, by the name they have on disk."""
    return {name: t for file in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(file).items()}
