"""Pretraining of the built-in model: a byte-level BPE tokenizer and a tiny OLMoE, on the built-in world's plain text.

Run `python -m emberfed.builtin.pretrain` to make the model that ships with the package again (CPU, one thread, about
ten minutes). The folder it writes holds a transformers model and tokenizer, and `recipe.json`: the exact
arguments and what came of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from emberfed.builtin import model_path, plain_text
from emberfed.seeds import Seeds

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
_DOCUMENTS_PER_CHUNK = 2000


@final
@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything the result depends on, besides library versions and the number of threads."""

    seed: int = 0
    vocab_size: int = 1536
    tokenizer_documents: int = 20_000
    hidden_size: int = 128
    expert_size: int = 64
    layers: int = 4
    heads: int = 4
    experts: int = 32
    top_k: int = 8
    router_aux_loss_coef: float = 0.01
    max_positions: int = 512
    sequence_tokens: int = 256
    batch_size: int = 8
    steps: int = 1400
    warmup_steps: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    threads: int = 1


def train_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose digits are single tokens, so that numbers are read digit by digit."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = plain_text(recipe.tokenizer_documents, Seeds(recipe.seed).at(part="tokenizer"))
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        model_max_length=recipe.max_positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def new_model(recipe: Recipe, tokenizer: Any) -> Any:
    """Return an OLMoE with fresh weights; the global random state is left as found."""
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.expert_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_positions,
        num_experts=recipe.experts,
        num_experts_per_tok=recipe.top_k,
        norm_topk_prob=False,
        router_aux_loss_coef=recipe.router_aux_loss_coef,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Seeds(recipe.seed).integer("initial weights"))
        return OlmoeForCausalLM(config)


def batches(recipe: Recipe, tokenizer: Any) -> Iterator[torch.Tensor]:
    """Yield packed batches without end: documents one after another, each closed by end-of-text.

    Yields:
        int64, (batch_size, sequence_tokens).
    """
    size = recipe.batch_size * recipe.sequence_tokens
    left = np.empty(0, dtype=np.int64)
    for chunk in itertools.count():
        texts = list(plain_text(_DOCUMENTS_PER_CHUNK, Seeds(recipe.seed).at(part="training", chunk=chunk)))
        ids = [token for row in tokenizer(texts)["input_ids"] for token in (*row, tokenizer.eos_token_id)]
        left = np.concatenate([left, np.asarray(ids, dtype=np.int64)])
        while len(left) >= size:
            yield torch.from_numpy(left[:size].copy()).view(recipe.batch_size, recipe.sequence_tokens)
            left = left[size:]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Return the rate of a step from 0: linear warm-up, then half a cosine down to a twentieth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(recipe: Recipe, model: Any, tokenizer: Any) -> float:
    """Train `model` in place with AdamW.

    Returns:
        Mean cross-entropy over the last twentieth of the steps, in nats per token, without the router's loss.
    """
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
    )
    model.train()
    losses: list[float] = []
    started = time.perf_counter()
    for step, input_ids in enumerate(itertools.islice(batches(recipe, tokenizer), recipe.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        output = model(input_ids=input_ids, labels=input_ids, output_router_logits=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        balance = float(output.aux_loss.detach())
        losses.append(float(output.loss.detach()) - recipe.router_aux_loss_coef * balance)
        if step % 50 == 49:
            tokens_per_second = (step + 1) * input_ids.numel() / (time.perf_counter() - started)
            print(
                f"step {step + 1}/{recipe.steps}  loss {np.mean(losses[-50:]):.4f}  "
                f"balance {balance:.3f}  {tokens_per_second:.0f} tokens/s",
                flush=True,
            )
    return float(np.mean(losses[-max(1, recipe.steps // 20) :]))


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer; weights are stored as bfloat16 to keep the package small."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the built-in model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=model_path(), help="folder to write")
    for option in fields(Recipe):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    output: Path = arguments.pop("output")
    recipe = Recipe(**arguments)

    torch.set_num_threads(recipe.threads)
    started = time.perf_counter()
    tokenizer = train_tokenizer(recipe)
    model = new_model(recipe, tokenizer)
    loss = pretrain(recipe, model, tokenizer)
    save(model, tokenizer, output)
    result = {
        "arguments": asdict(recipe),
        "parameters": model.num_parameters(),
        "training_tokens": recipe.steps * recipe.batch_size * recipe.sequence_tokens,
        "final_loss": round(loss, 4),
        "seconds": round(time.perf_counter() - started),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
            "numpy": np.__version__,
        },
    }
    (output / "recipe.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
