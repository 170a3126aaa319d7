"""Every way an upload can be bad is refused, by name, with words that say why."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from emberfed.admission import Asked, payload_problem, problem_of
from emberfed.engines.flaky import Fault, spoil
from emberfed.records import ACTIVATION_COUNTS, Bundle, Payload, Rank, Reply, TensorSpec

SPECS = {
    "a": TensorSpec((2, 3), torch.float32),
    "b": TensorSpec((2, Rank(1, 4)), torch.float32),
    "counts": TensorSpec((2,), torch.int64),
}
ASKED = {"c1": Asked(3, "c1", SPECS, 2), "c2": Asked(3, "c2", SPECS, 1)}
META: dict[str, Any] = {"examples": 5, "tokens": 40, "top_k": 2, "stats": {"loss_mean": 1.5, "flops": 10}}


def payload(tensors: dict[str, torch.Tensor] | None = None, **meta: Any) -> Payload:
    good = {"a": torch.ones(2, 3), "b": torch.zeros(2, 2), "counts": torch.tensor([0, 7])}
    return Payload(3, "c1", Bundle({**good, **(tensors or {})}, {**META, **meta}))


def reply(upload: Payload, client: str = "c1") -> Reply:
    return Reply(3, client, upload.to_bytes(), {})


def test_a_good_upload_is_admitted() -> None:
    assert payload_problem(payload(), ASKED["c1"]) is None
    assert problem_of(reply(payload()), ASKED, {"c2"}) == ("c1", None)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (payload({"a": torch.full((2, 3), torch.inf)}), "tensor 'a': 6 of 6 values are not finite"),
        (payload({"b": torch.zeros(2, 5)}), r"tensor 'b': shape \(2, 5\), expected \(2, 1 to 4\)"),
        (payload({"b": torch.zeros(2, 0)}), "tensor 'b': shape"),
        (payload({"a": torch.full((2, 3), -3e38)}), "tensor 'a': values above 1e.15, too large to be aggregated"),
        (payload({"a": torch.ones(2, 3).half()}), "tensor 'a': dtype torch.float16"),
        (payload({"counts": torch.tensor([0, -1])}), "tensor 'counts': negative"),
        (payload({"x": torch.ones(1), "y": torch.ones(1)}), "foreign tensor 'x' and 1 more"),
        (replace(payload(), content=Bundle({"a": torch.ones(2, 3)}, META)), "tensor 'b' is missing and 1 more"),
        (replace(payload(), round=2), "round 2, this is round 3"),
        (replace(payload(), client="c2"), "comes from 'c2'"),
        (payload(examples=0), "'examples' must be a whole number"),
        (payload(examples=True), "'examples'"),
        (payload(examples=10**400), "'examples' must be a whole number from 1 to .*, found a number of 1329 bits"),
        (payload(tokens="x" * 100), "'tokens' must be .*, found 'x{59}...$"),
        (payload(stats={"loss_mean": 1e308, "flops": 1}), "'stats.loss_mean' must be a number below 1e"),
        (payload(stats={"loss_mean": 1, "flops": 10**400}), "'stats.flops' must be a number below .* 1329 bits"),
        (payload(examples=2.5), "'examples'"),
        (payload(tokens="many"), "'tokens'"),
        (payload(top_k=8), "'top_k' is 8, the client was given 2"),
        (payload(stats=[]), "'stats' must be a mapping"),
        (payload(stats={"loss_mean": 1.0}), "'stats.flops' must be a number"),
        (payload(stats={"loss_mean": True, "flops": 1}), "'stats.loss_mean'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_upload_is_refused_with_the_reason(bad: Payload, words: str) -> None:
    sender, problem = problem_of(reply(bad), ASKED, set())
    assert sender == "c1"
    with pytest.raises(ValueError, match=words):
        raise ValueError(problem)


def test_a_rank_is_the_senders_choice_but_one_for_the_whole_upload() -> None:
    specs = {"a": TensorSpec((Rank(1, 4), 3), torch.float32), "b": TensorSpec((2, Rank(1, 4)), torch.float32)}
    asked = Asked(3, "c1", specs, 2)

    def of_ranks(a: int, b: int) -> Payload:
        return Payload(3, "c1", Bundle({"a": torch.ones(a, 3), "b": torch.ones(2, b)}, META))

    assert payload_problem(of_ranks(3, 3), asked) is None
    assert payload_problem(of_ranks(3, 4), asked) == "tensor 'b': ranks differ within the upload, found [3, 4]"


def with_counts(counts: list[list[int]], **meta: Any) -> Payload:
    return payload({ACTIVATION_COUNTS: torch.tensor(counts)}, **meta)


COUNTED = {**SPECS, ACTIVATION_COUNTS: TensorSpec((2, 3), torch.int64)}
"""Of 40 tokens, at K = 2 or an adapter's k, two layers of three experts have counts."""


def test_counts_must_be_tokens_times_k() -> None:
    asked = Asked(3, "c1", COUNTED, 2)
    assert payload_problem(with_counts([[40, 40, 0], [39, 10, 31]]), asked) is None
    greedy = with_counts([[40, 40, 0], [39, 10, 4090]])
    assert payload_problem(greedy, asked) == "activation counts of a layer sum to 4139, tokens x top_k is 80"


def test_no_expert_is_given_a_token_twice() -> None:
    problem = payload_problem(with_counts([[41, 39, 0], [40, 40, 0]]), Asked(3, "c1", COUNTED, 2))
    assert problem == "activation counts say that an expert was given 41 tokens, of 40 in all"


def test_counts_of_an_adapter_are_tokens_times_its_own_k() -> None:
    asked = Asked(3, "c1", COUNTED, 2, 1)
    assert payload_problem(with_counts([[40, 0, 0], [9, 1, 30]], adapter_top_k=1), asked) is None
    problem = payload_problem(with_counts([[40, 40, 0], [39, 10, 31]], adapter_top_k=1), asked)
    assert problem == "activation counts of a layer sum to 80, tokens x adapter_top_k is 40"


@pytest.mark.parametrize(
    ("given", "sent", "words"),
    [
        (2, {"adapter_top_k": 3}, "'adapter_top_k' is 3, the client was given 2"),
        (2, {}, "'adapter_top_k' is None, the client was given 2"),
        (None, {"adapter_top_k": 1}, "'adapter_top_k' is 1, the client was given None"),
    ],
)
def test_an_adapters_k_is_the_one_given(given: int | None, sent: dict[str, Any], words: str) -> None:
    assert payload_problem(payload(**sent), Asked(3, "c1", SPECS, 2, given)) == words


def test_strangers_repeats_and_garbage() -> None:
    assert problem_of(reply(payload(), "c11"), ASKED, set()) == (
        "c11",
        "was not asked in this round; did you mean 'c1'?",
    )
    assert problem_of(reply(payload()), ASKED, {"c1"}) == ("c1", "answered twice")
    sender, problem = problem_of(Reply(3, "c1", b"garbage", {}), ASKED, set())
    assert sender == "c1"
    assert problem is not None
    assert "not a bundle" in problem


@pytest.mark.parametrize(
    "fault", ["nan", "shape", "dtype", "missing", "foreign", "weight", "old_round", "garbage", "stranger"]
)
def test_every_fault_of_the_flaky_engine_is_noticed(fault: Fault) -> None:
    good = payload().to_bytes()
    assert problem_of(Reply(3, "c1", good, {}), ASKED, set())[1] is None
    assert problem_of(Reply(3, "c1", spoil(good, fault), {}), ASKED, set())[1] is not None
