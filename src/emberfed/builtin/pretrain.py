"""Pretraining of the built-in model: a byte-level BPE tokenizer and a tiny OLMoE, on the built-in world's plain text.

Run `python -m emberfed.builtin.pretrain` to make the model that ships with the package again (CPU, one thread, about
ten minutes). `--family NAME --output FOLDER` makes a small model of another architecture in the same way, of the same
text and with the same tokenizer: `llama` (dense), `llama-moe` (a dense LLaMA whose FFNs are divided into experts, then
trained further) or `deepseek` (shared experts, latent attention). The folder written holds a transformers model and
tokenizer, and `recipe.json`: the exact arguments and what came of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import platform
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, final

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
)

from emberfed.builtin import model_path, plain_text
from emberfed.models.balance import switch_loss
from emberfed.models.upcycle import UpcycleConfig, upcycle
from emberfed.seeds import Seeds

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
_DOCUMENTS_PER_CHUNK = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Pretraining(ABC):
    """Everything the result depends on, besides library versions and the number of threads.

    Attributes are those of the training; what they add is the tokenizer and the model.
    """

    seed: int = 0
    sequence_tokens: int = 256
    batch_size: int = 8
    steps: int = 1400
    warmup_steps: int = 100
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    threads: int = 1

    @abstractmethod
    def tokenizer(self) -> Any:
        """Return the tokenizer."""

    @abstractmethod
    def build(self, tokenizer: Any) -> Any:
        """Return the model to train; fresh weights are drawn from torch's global stream."""

    @abstractmethod
    def losses(self, model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return what is minimised, and the cross-entropy in it, in nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FromScratch(Pretraining):
    """A tokenizer and a model of our own: their sizes."""

    vocab_size: int = 1536
    tokenizer_documents: int = 20_000
    hidden_size: int = 128
    layers: int = 4
    heads: int = 4
    max_positions: int = 512

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Train the tokenizer."""
        return train_tokenizer(self)

    def common(self, tokenizer: Any) -> dict[str, Any]:
        """Return the settings that transformers' configs of all architectures here share."""
        return {
            "vocab_size": len(tokenizer),
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "max_position_embeddings": self.max_positions,
            "tie_word_embeddings": True,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(FromScratch):
    """The built-in model: an OLMoE."""

    expert_size: int = 64
    experts: int = 32
    top_k: int = 8
    router_aux_loss_coef: float = 0.01

    def build(self, tokenizer: Any) -> Any:
        """Return an OLMoE with fresh weights."""
        config = OlmoeConfig(
            **self.common(tokenizer),
            intermediate_size=self.expert_size,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            norm_topk_prob=False,
            router_aux_loss_coef=self.router_aux_loss_coef,
        )
        return OlmoeForCausalLM(config)

    def losses(self, model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the loss with the routers' own, and without it."""
        return _losses_with_transformers_balance(model, input_ids, self.router_aux_loss_coef)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DenseRecipe(FromScratch):
    """Its dense relative: a LLaMA about as large as the part of the built-in model that is active at its own K."""

    hidden_size: int = 192
    mlp_size: int = 512
    heads: int = 6
    steps: int = 900

    def build(self, tokenizer: Any) -> Any:
        """Return a LLaMA with fresh weights."""
        return LlamaForCausalLM(LlamaConfig(**self.common(tokenizer), intermediate_size=self.mlp_size))

    def losses(self, model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the cross-entropy, which is all there is."""
        loss: torch.Tensor = model(input_ids=input_ids, labels=input_ids).loss
        return loss, float(loss.detach())


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaMoeRecipe(Pretraining):
    """A dense LLaMA made sparse and trained further, as LLaMA-MoE is (https://arxiv.org/abs/2406.16554).

    The neurons of each FFN are divided among experts by balanced k-means. The training goes on with text that the dense
    model has not read, which is why the seed is another one than the dense recipe's.

    Attributes:
        dense: Folder of the dense model, whose tokenizer is kept.
        experts: Per layer.
        top_k: Experts per token.
        router_aux_loss_coef: Of the routers' balance.
    """

    dense: str = "models/world-llama"
    seed: int = 1
    experts: int = 16
    top_k: int = 4
    router_aux_loss_coef: float = 0.01
    steps: int = 700
    learning_rate: float = 1e-3

    def tokenizer(self) -> Any:
        """Read the dense model's tokenizer."""
        return AutoTokenizer.from_pretrained(self.dense)

    def build(self, tokenizer: Any) -> Any:
        """Return the dense model with its FFNs divided, a Mixtral."""
        options = UpcycleConfig(method="clustered", num_experts=self.experts, top_k=self.top_k, seed=self.seed)
        with tempfile.TemporaryDirectory() as folder:
            sparse = upcycle(Path(self.dense), Path(folder) / "sparse", options).path
            model = AutoModelForCausalLM.from_pretrained(sparse, dtype=torch.float32)
        model.config.router_aux_loss_coef = model.router_aux_loss_coef = self.router_aux_loss_coef
        return model

    def losses(self, model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the loss with the routers' own, and without it."""
        return _losses_with_transformers_balance(model, input_ids, self.router_aux_loss_coef)


@final
@dataclass(frozen=True, slots=True, kw_only=True)
class DeepseekRecipe(FromScratch):
    """A DeepSeek-V2 shaped as DeepSeekMoE is (https://arxiv.org/abs/2401.06066), with latent attention.

    Shared experts that every token passes, many small routed ones of which the best are kept without groups, and a
    first layer without experts.

    The router's weights are its softmax over all experts, never renormalised, so K of E begin with K / E together. They
    are scaled by E / K, to begin with 1 together (DeepSeek-V2 scales by 16): without it the shared experts take over
    more, and the routed ones matter less.
    """

    mlp_size: int = 384
    expert_size: int = 64
    experts: int = 32
    shared_experts: int = 2
    top_k: int = 4
    latent_size: int = 64
    head_size: int = 32
    rotary_size: int = 16
    router_aux_loss_coef: float = 0.005
    steps: int = 900

    def build(self, tokenizer: Any) -> Any:
        """Return a DeepSeek-V2 with fresh weights."""
        config = DeepseekV2Config(
            **self.common(tokenizer),
            intermediate_size=self.mlp_size,
            moe_intermediate_size=self.expert_size,
            n_routed_experts=self.experts,
            n_shared_experts=self.shared_experts,
            num_experts_per_tok=self.top_k,
            first_k_dense_replace=1,
            topk_method="greedy",
            routed_scaling_factor=self.experts / self.top_k,
            kv_lora_rank=self.latent_size,
            q_lora_rank=None,
            qk_nope_head_dim=self.head_size,
            qk_rope_head_dim=self.rotary_size,
            v_head_dim=self.head_size,
        )
        return DeepseekV2ForCausalLM(config)

    def losses(self, model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, float]:
        """Return the loss with the routers' own, and without it.

        transformers has no loss of the routers for this architecture, so Switch's is added here, layer by layer.
        """
        output = model.model(input_ids=input_ids, output_router_logits=True)
        logits_NV = model.lm_head(output.last_hidden_state[:, :-1]).flatten(0, 1)
        entropy = cross_entropy(logits_NV, input_ids[:, 1:].flatten())
        balance = torch.stack(
            [switch_loss(logits_TE, logits_TE.topk(self.top_k).indices) for logits_TE in output.router_logits]
        ).sum()
        return entropy + self.router_aux_loss_coef * balance, float(entropy.detach())


def _losses_with_transformers_balance(
    model: Any, input_ids: torch.Tensor, coefficient: float
) -> tuple[torch.Tensor, float]:
    """Return the loss with the routers' own, which transformers has scaled by `coefficient`, and without it."""
    output = model(input_ids=input_ids, labels=input_ids, output_router_logits=True)
    balance = float(output.aux_loss.detach())
    return output.loss, float(output.loss.detach()) - coefficient * balance


def train_tokenizer(recipe: FromScratch) -> PreTrainedTokenizerFast:
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


def new_model(recipe: Pretraining, tokenizer: Any) -> Any:
    """Return the recipe's model before training; the global random state is left as found."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Seeds(recipe.seed).integer("initial weights"))
        return recipe.build(tokenizer)


def batches(recipe: Pretraining, tokenizer: Any) -> Iterator[torch.Tensor]:
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


def learning_rate(recipe: Pretraining, step: int) -> float:
    """Return the rate of a step from 0: linear warm-up, then half a cosine down to a twentieth."""
    if step < recipe.warmup_steps:
        return recipe.learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def pretrain(recipe: Pretraining, model: Any, tokenizer: Any) -> float:
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
        loss, entropy = recipe.losses(model, input_ids)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(entropy)
        if step % 50 == 49:
            tokens_per_second = (step + 1) * input_ids.numel() / (time.perf_counter() - started)
            print(
                f"step {step + 1}/{recipe.steps}  loss {np.mean(losses[-50:]):.4f}  {tokens_per_second:.0f} tokens/s",
                flush=True,
            )
    return float(np.mean(losses[-max(1, recipe.steps // 20) :]))


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write model and tokenizer; weights are stored as bfloat16 to keep the package small."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for their owner alone; the other files' mode is the user's
        weights.chmod((folder / "config.json").stat().st_mode)


def main() -> None:
    """Make the built-in model, or one of another family."""
    output, recipe = _arguments()
    torch.set_num_threads(recipe.threads)
    started = time.perf_counter()
    tokenizer = recipe.tokenizer()
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


RECIPES: Mapping[str, type[Recipe | DenseRecipe | LlamaMoeRecipe | DeepseekRecipe]] = {
    "olmoe": Recipe,
    "llama": DenseRecipe,
    "llama-moe": LlamaMoeRecipe,
    "deepseek": DeepseekRecipe,
}
"""By the name of the family."""


def _arguments() -> tuple[Path, Pretraining]:
    """Read the command line: which recipe, and then its own options."""
    kind = argparse.ArgumentParser(add_help=False)
    kind.add_argument("--family", choices=RECIPES, default="olmoe", help="architecture of the model")
    family = kind.parse_known_args()[0].family
    recipe = RECIPES[family]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, parents=[kind]
    )
    shipped = model_path() if family == "olmoe" else None
    parser.add_argument("--output", type=Path, default=shipped, required=shipped is None, help="folder to write")
    for option in fields(recipe):
        flag = f"--{option.name.replace('_', '-')}"
        parser.add_argument(flag, type=type(option.default), default=option.default)
    arguments = vars(parser.parse_args())
    del arguments["family"]
    output: Path = arguments.pop("output")
    return output, recipe(**arguments)


if __name__ == "__main__":
    main()
