"""Evaluation against slow references: one example at a time, token by token."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import VOCABULARY, tiny_lm, tiny_model, tiny_tokenizer
from rouge_score.rouge_scorer import RougeScorer
from torch.nn import functional as F

from emberfed.data.tokenise import Example, ResponseShard, ShardReport
from emberfed.evaluation import EvaluationConfig, evaluate
from emberfed.evaluation.quality import Answer, generate, response_losses, summarise
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load


def make_shard(count: int = 7) -> ResponseShard:
    draw = np.random.default_rng(2)
    examples = []
    for number in range(count):
        length = int(draw.integers(5, 14))
        ids = draw.integers(3, VOCABULARY, size=length).astype(np.int32)
        cut = int(draw.integers(1, length - 1))
        reference = " ".join(f"w{index}" for index in ids[cut:])
        examples.append(Example(ids, cut, reference, ("odd", "even")[number % 2]))
    return ResponseShard(tuple(examples), ShardReport(count, 0, 0, 0, 0), pad_token_id=0)


@pytest.fixture(scope="module")
def model() -> FoundationModel:
    return tiny_model()


def slow_answer(model: FoundationModel, example: Example, max_new_tokens: int) -> list[int]:
    """Greedy decoding without batch, padding or cache."""
    ids = example.input_ids[: example.prompt_length].tolist()
    fresh: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model.lm(input_ids=torch.tensor([ids + fresh])).logits
        fresh.append(int(logits[0, -1].argmax()))
        if fresh[-1] == 1:
            break
    return fresh


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_batched_answers_are_those_of_one_example_at_a_time(model: FoundationModel, top_k: int) -> None:
    tokenizer, shard = tiny_tokenizer(), make_shard()
    with model.active_experts(top_k), torch.inference_mode():
        together = generate(model, tokenizer, shard.examples, 0, 6)
        alone = [
            tokenizer.decode(slow_answer(model, example, 6), skip_special_tokens=True).strip()
            for example in shard.examples
        ]
    assert together == alone
    assert len(set(together)) > 1


def test_losses_are_those_of_one_token_at_a_time(model: FoundationModel) -> None:
    shard = make_shard()
    with torch.no_grad():
        for example, (loss_sum, targets) in zip(shard.examples, response_losses(model, shard.examples, 0), strict=True):
            ids = torch.from_numpy(example.input_ids.astype(np.int64))
            logits = model.lm(input_ids=ids[None]).logits[0]
            slow = sum(
                float(F.cross_entropy(logits[position - 1], ids[position]))
                for position in range(example.prompt_length, len(ids))
            )
            assert targets == len(ids) - example.prompt_length
            assert loss_sum == pytest.approx(slow, rel=1e-4)


def test_batch_size_does_not_change_scores_and_answers_keep_their_order(model: FoundationModel) -> None:
    tokenizer, shard = tiny_tokenizer(), make_shard()
    told: list[tuple[int, int]] = []
    one, answers = evaluate(
        model,
        tokenizer,
        shard,
        EvaluationConfig(batch_size=3, max_new_tokens=5),
        lambda *progress: told.append(progress),
    )
    other, alone = evaluate(model, tokenizer, shard, EvaluationConfig(batch_size=1, max_new_tokens=5))
    assert [answer.text for answer in answers] == [answer.text for answer in alone]
    assert one.overall.rouge_l == pytest.approx(other.overall.rouge_l)
    assert one.overall.loss == pytest.approx(other.overall.loss, rel=1e-5)
    assert told == [(3, 7), (6, 7), (7, 7)]
    assert [answer.category for answer in answers] == [example.category for example in shard.examples]
    scorer = RougeScorer(["rougeL"])
    for example, answer in zip(shard.examples, answers, strict=True):
        assert answer.rouge_l == scorer.score(example.reference, answer.text)["rougeL"].fmeasure


def test_a_checkpoints_own_penalties_do_not_change_greedy_answers(tmp_path: Path) -> None:
    shard, tokenizer = make_shard(), tiny_tokenizer()
    answers = []
    for name, settings in {"plain": {}, "penal": {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1}}.items():
        lm = tiny_lm()
        lm.generation_config.update(**settings)
        lm.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        model, _ = load(ModelConfig(path=str(tmp_path / name)))
        with torch.inference_mode():
            answers.append(generate(model, tokenizer, shard.examples, 0, 8))
    assert answers[0] == answers[1]
    assert any(len(set(text.split())) < len(text.split()) for text in answers[0]), "something is repeated"


def test_a_cap_on_examples(model: FoundationModel) -> None:
    scores, answers = evaluate(
        model, tiny_tokenizer(), make_shard(), EvaluationConfig(max_examples=3, max_new_tokens=2)
    )
    assert scores.overall.examples == len(answers) == 3


def test_summary_worked_by_hand() -> None:
    """Losses 2 + 6 over 1 + 3 tokens are 2 nats per token; ROUGE-L is the mean over examples, not tokens."""
    answers = [Answer("a", "", 0.5, 2.0, 1), Answer("b", "", 0.0, 6.0, 3), Answer("", "", 0.1, 0.0, 0)]
    scores = summarise(answers)
    assert scores.overall.loss == 2.0
    assert scores.overall.perplexity == pytest.approx(math.exp(2))
    assert scores.overall.rouge_l == pytest.approx(0.2)
    assert {name: (score.loss, score.examples) for name, score in scores.categories.items()} == {
        "a": (2.0, 1),
        "b": (2.0, 1),
    }
    assert json.loads(json.dumps(scores.json()))["categories"]["a"]["rouge_l"] == 0.5


def test_rouge_l_of_hand_worked_pairs() -> None:
    """Longest common subsequence by hand: 'a b c d' and 'a c e' share 'a c': P 2/3, R 2/4, F 4/7."""
    scorer = RougeScorer(["rougeL"], use_stemmer=EvaluationConfig().stemmer)
    assert scorer.score("a b c d", "a c e")["rougeL"].fmeasure == pytest.approx(4 / 7)
    assert scorer.score("houses", "house")["rougeL"].fmeasure == 0.0, "no stemming unless asked for"


def test_rouge_l_of_published_vectors(shared: Path) -> None:
    vectors = json.loads((shared / "testvectors" / "testvectors.json").read_text())["rouge"]
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    cases = [case for case in [*vectors["simple"], *vectors["long"]] if "rougeL" in case or "plain" in case]
    for case in cases:
        expected = case.get("rougeL") or case["plain"]["rougeL"]
        found = scorer.score(case["target"], case["prediction"])["rougeL"]
        assert list(found) == pytest.approx(expected, abs=1e-4)
    assert len(cases) >= 4
