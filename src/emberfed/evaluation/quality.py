"""ROUGE-L of greedy answers, response loss and perplexity on the held-out split, overall and by category."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional as F
from transformers import GenerationConfig, PreTrainedTokenizerBase

from emberfed.data.tokenise import IGNORED, Example, ResponseShard, collate, left_padded
from emberfed.evaluation.config import EvaluationConfig
from emberfed.evaluation.scores import Score, Scores
from emberfed.models.foundation_model import FoundationModel


@final
@dataclass(frozen=True, slots=True)
class ResponseScore(Score):
    """Quality on some examples: mean ROUGE-L F, mean nats per response token, its exponential."""

    rouge_l: float
    perplexity: float


@final
@dataclass(frozen=True, slots=True)
class Answer:
    """What the model did with one example."""

    category: str
    text: str
    rouge_l: float
    loss_sum: float
    target_tokens: int


def evaluate(
    model: FoundationModel,
    tokenizer: PreTrainedTokenizerBase,
    shard: ResponseShard,
    config: EvaluationConfig,
    progress: Callable[[int, int], None] = lambda done, total: None,  # noqa: ARG005
) -> tuple[Scores[ResponseScore], list[Answer]]:
    """Score the model, as it stands (adapter attached, K set), on the shard.

    Args:
        model: The model under evaluation.
        tokenizer: Its tokenizer.
        shard: Held-out examples.
        config: Options.
        progress: Called with the examples done and in total.

    Returns:
        The scores, and the answers in the shard's order.
    """
    examples = shard.examples[: config.max_examples]
    # Batches of similar length waste less padding; the order of the answers is restored afterwards.
    order = sorted(range(len(examples)), key=lambda index: (len(examples[index].input_ids), index))
    scorer = RougeScorer(["rougeL"], use_stemmer=config.stemmer)
    answers: dict[int, Answer] = {}
    with torch.inference_mode():
        for indices in _chunks(order, config.batch_size):
            batch = [examples[index] for index in indices]
            texts = generate(model, tokenizer, batch, shard.pad_token_id, config.max_new_tokens)
            losses = response_losses(model, batch, shard.pad_token_id)
            for index, example, text, (loss_sum, targets) in zip(indices, batch, texts, losses, strict=True):
                rouge_l = scorer.score(example.reference, text)["rougeL"].fmeasure
                answers[index] = Answer(example.category, text, rouge_l, loss_sum, targets)
            progress(len(answers), len(examples))
    ordered = [answers[index] for index in range(len(examples))]
    return summarise(ordered), ordered


def generate(
    model: FoundationModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    pad_token_id: int,
    max_new_tokens: int,
) -> list[str]:
    """Return the greedy answers to the examples' prompts, as one left-padded batch."""
    prompts = left_padded(examples, pad_token_id)
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad_token_id,
    )
    output: Any = model.lm.generate(
        input_ids=prompts.input_ids.to(model.device),
        attention_mask=prompts.attention_mask.to(model.device),
        generation_config=greedy,
    )
    fresh = output[:, prompts.input_ids.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(fresh, skip_special_tokens=True)]


def response_losses(model: FoundationModel, examples: Sequence[Example], pad_token_id: int) -> list[tuple[float, int]]:
    """Return, for each example, the summed cross-entropy of its response and its number of target tokens."""
    batch = collate(examples, pad_token_id).to(model.device)
    positions = (batch.labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
    logits = model.lm(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, logits_to_keep=positions, use_cache=False
    ).logits.float()
    targets = batch.labels[:, positions + 1]
    losses = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    sums, counts = losses.double().sum(dim=1).tolist(), (targets != IGNORED).sum(dim=1).tolist()
    return list(zip(sums, counts, strict=True))


def summarise(answers: Sequence[Answer]) -> Scores[ResponseScore]:
    """Return scores over all answers and by category."""
    names = sorted({answer.category for answer in answers if answer.category})
    categories = {name: _score([answer for answer in answers if answer.category == name]) for name in names}
    return Scores(_score(answers), categories)


def _score(answers: Sequence[Answer]) -> ResponseScore:
    loss = math.fsum(answer.loss_sum for answer in answers) / sum(answer.target_tokens for answer in answers)
    rouge_l = math.fsum(answer.rouge_l for answer in answers) / len(answers)
    perplexity = math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
    return ResponseScore(loss, len(answers), rouge_l, perplexity)


def _chunks(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))
