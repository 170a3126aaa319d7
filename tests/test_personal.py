"""Clients' own models on their own data: never trained on, nobody left out, nobody spoils the figures, same bits."""

from __future__ import annotations

import json
import math
import signal
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import write_config
from federations import Vision, bits
from hypothesis import given
from hypothesis import strategies as st
from test_kill import start, wait_until_written

import emberfed
from emberfed import assembly, events, personal
from emberfed.clients import Budget, Client
from emberfed.config import parse
from emberfed.metrics import CLASSIFICATION
from emberfed.models.sparse_adapter import attached
from emberfed.personal import worst_decile
from emberfed.records import SCORES, Bundle, ClientFailed, Json, Payload, Reply

LOCAL = {"name": "fft_moe"}
"""The method whose clients keep most: a gate of their own."""


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Vision:
    return Vision.made(tmp_path_factory.mktemp("vision"))


def values(vision: Vision, rounds: int = 2, **sections: Any) -> dict[str, Any]:
    given = {"method": LOCAL, "training": {"rounds": rounds}, "data": {"client_test_share": 0.3}}
    return vision.config(**{**given, **sections})


@pytest.fixture(scope="module")
def reference(vision: Vision, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rounds without any trouble."""
    return emberfed.run(values(vision), output=tmp_path_factory.mktemp("reference") / "run").path


def lines(run: Path, *kinds: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without what a clock says."""
    read = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key != "seconds"} for line in read if line["event"] in kinds]


def memories(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in sorted((run / "memory").rglob("*.safetensors"))}


# The examples kept apart.


def test_kept_examples_are_trained_on_by_nobody(vision: Vision) -> None:
    """All images differ, so each must be in exactly one place: a client's training, a client's own test, the test."""
    material = assembly.gather(parse(values(vision)))
    everything: list[bytes] = []
    for id_, rows in material.members.record()["rows"].items():
        trained, kept = material.shards[id_], material.held_out[id_]
        assert len(kept.examples) == max(1, round(0.3 * len(rows)))
        assert len(trained.examples) + len(kept.examples) == len(rows)
        everything += [example.pixels.tobytes() for shard in (trained, kept) for example in shard.examples]
    everything += [example.pixels.tobytes() for example in material.test.examples]
    assert len(everything) == len(set(everything)) == 50
    for client in material.clients:
        assert client.examples == len(material.shards[client.id].examples), "it weighs by what it trains on"


def test_a_share_of_nothing_leaves_no_lines(vision: Vision, tmp_path: Path) -> None:
    chosen = values(vision, 1, data={"client_test_share": 0.0})
    run = emberfed.run(chosen, output=tmp_path / "run").path
    assert lines(run, "personal", "personal_summary") == []
    assert assembly.gather(parse(chosen)).held_out == {}


# A run's lines.


def test_every_client_has_a_line_and_the_summary_is_of_these(vision: Vision, reference: Path) -> None:
    material = assembly.gather(parse(values(vision)))
    for round in range(3):
        own = [line for line in lines(reference, "personal") if line["round"] == round]
        [summary] = [line for line in lines(reference, "personal_summary") if line["round"] == round]
        assert [line["client"] for line in own] == ["c0", "c1", "c2", "c3"]
        for line, client in zip(own, material.clients, strict=True):
            budget = (client.budget.tier, client.budget.top_k, client.budget.adapter_top_k)
            assert (line["tier"], line["top_k"], line["adapter_top_k"]) == budget
            assert line["examples"] == len(material.held_out[client.id].examples)
            assert (line["accuracy"] * line["examples"]) % 1 == pytest.approx(0, abs=1e-9)
        accuracies, losses = [line["accuracy"] for line in own], [line["loss"] for line in own]
        assert summary["clients"] == 4
        assert summary["mean"] == pytest.approx(sum(accuracies) / 4)
        assert summary["worst_decile"] == min(accuracies)
        assert summary["spread"] == pytest.approx(statistics.pstdev(accuracies))
        assert summary["loss_mean"] == pytest.approx(sum(losses) / 4)


def test_before_any_training_it_is_the_base_model(vision: Vision, reference: Path) -> None:
    material = assembly.gather(parse(values(vision)))
    for line in lines(reference, "personal")[:4]:
        shard = material.held_out[line["client"]]
        batch: Any = shard.collate(shard.examples)
        with torch.inference_mode():
            chosen = material.model.lm(**batch.inputs()).logits.argmax(-1)
        assert line["accuracy"] == pytest.approx(float((chosen == batch.labels).double().mean()))


def test_a_clients_line_is_of_the_shared_experts_with_its_own_gate(vision: Vision, reference: Path) -> None:
    """Put together from the last round's state and what lies in the client's memory."""
    material = assembly.gather(parse(values(vision)))
    shared = Bundle.open(reference / "rounds" / "0002" / "state.safetensors").tensors
    moved = []
    for line in lines(reference, "personal")[-4:]:
        memory = Bundle.open(reference / "memory" / line["client"] / "000002.safetensors").tensors
        names = [name for name in shared if name.startswith(("layers.", "head."))]
        own = {name: memory[name] if name in memory else shared[name] for name in names}
        moved += [not torch.equal(own[name], shared[name]) for name in names if name in memory]
        shard = material.held_out[line["client"]]
        batch: Any = shard.collate(shard.examples)
        with torch.inference_mode(), attached(material.model, own, line["adapter_top_k"]):
            logits = material.model.lm(**batch.inputs()).logits
        loss = torch.nn.functional.cross_entropy(logits, batch.labels)
        assert line["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert len(moved) == 8
    assert all(moved), "each client has a gate of its own"


def test_assessments_leave_no_trace(vision: Vision, reference: Path, tmp_path: Path) -> None:
    """Neither in states and uploads nor in what clients keep."""
    seldom = emberfed.run(values(vision, evaluation={"every": 0}), output=tmp_path / "run").path
    assert bits(seldom) == bits(reference)
    assert memories(seldom) == memories(reference)
    assert sorted({name.partition("/")[2] for name in memories(reference)}) == sorted(
        f"c{client}/{round:06d}.safetensors" for client in range(4) for round in (1, 2)
    )
    assert [line["round"] for line in lines(seldom, "personal_summary")] == [0, 2]


def test_cut_and_resumed_runs_have_the_same_lines_and_bits(vision: Vision, tmp_path: Path) -> None:
    """Two of four clients in each round, so that some join late and some keep a gate of a round long gone."""

    def cohorts(rounds: int) -> dict[str, Any]:
        chosen = values(vision, rounds)
        return {**chosen, "clients": {**chosen["clients"], "per_round": 2}}

    whole = emberfed.run(cohorts(4), output=tmp_path / "whole").path
    cut = emberfed.run(cohorts(2), output=tmp_path / "cut").path
    emberfed.resume(cut, rounds=4)
    assert bits(cut) == bits(whole)
    assert memories(cut) == memories(whole)
    kinds = ("evaluation", "personal", "personal_summary")
    told = [{key: line[key] for key in line if key != "peak_memory_bytes"} for line in lines(whole, *kinds)]
    assert told == [{key: line[key] for key in line if key != "peak_memory_bytes"} for line in lines(cut, *kinds)]
    assert len(lines(whole, "personal")) == 5 * 4


@pytest.mark.slow
def test_killed_and_resumed_runs_have_the_same_lines_and_bits(vision: Vision, reference: Path, tmp_path: Path) -> None:
    """Killed in the first round, and again in the second."""
    file, run = write_config(tmp_path / "config.yaml", values(vision)), tmp_path / "run"
    kills = 0
    for files, command in ((4, ("run", file, "--output", run)), (9, ("resume", run))):
        process = start(*command)
        wait_until_written(run, process, files)
        time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    emberfed.resume(run)
    assert bits(run) == bits(reference)
    assert memories(run) == memories(reference)
    assert lines(run, "personal", "personal_summary") == lines(reference, "personal", "personal_summary")


@pytest.mark.parametrize(
    "fault",
    [
        "drop",
        "garbage",
        *(pytest.param(f, marks=pytest.mark.slow) for f in ("raise", "old_round", "stranger", "twice")),
    ],
)
def test_a_client_that_gives_no_usable_answer_is_left_out_and_named(
    vision: Vision, reference: Path, tmp_path: Path, fault: str
) -> None:
    """The faults strike after the last round only: questions then carry the number of the next."""
    engine = {"name": "flaky", "seed": 4, "faults": {"c1": fault}, "rounds": [3]}
    heard: list[events.Event] = []
    run = emberfed.run(values(vision, engine=engine), output=tmp_path / "run", listen=heard.append).path
    assert bits(run) == bits(reference)
    sound = [line for line in lines(reference, "personal") if (line["round"], line["client"]) != (2, "c1")]
    assert lines(run, "personal") == sound
    assert [line["clients"] for line in lines(run, "personal_summary")] == [4, 4, 3]
    notices = [event.message for event in heard if isinstance(event, events.Notice)]
    assert len(notices) == 1
    assert notices[0].startswith("round 2: no personal evaluation of c1: ")
    assert json.loads((run / "events.jsonl").read_text().splitlines()[-1])["message"] == notices[0]


# The figures, by hand.

TWENTY = [Client(f"c{number:02d}", Budget("phone", 1, None, 2), 5) for number in range(20)]


def answer(client: str, round: int = 4, claims: str | None = None, **scores: Json) -> Reply:
    meta = {SCORES: {"accuracy": 0.5, "loss": 1.0, "examples": 4, **scores}}
    upload = Payload(round, claims or client, Bundle(meta=meta)).to_bytes()
    return Reply(round, client, upload, {"seconds": 1.0})


def told(*replies: Reply | ClientFailed) -> tuple[list[dict[str, Json]], list[str]]:
    """What twenty clients, asked after round 3, come to: lines and warnings."""
    heard: list[events.Event] = []
    answers = personal.Answers(TWENTY, CLASSIFICATION, 3, heard.append)
    for reply in replies:
        answers.receive(reply)
    return answers.lines(), [event.message for event in heard if isinstance(event, events.Notice)]


def test_twenty_clients_by_hand() -> None:
    """Accuracies 0.00, 0.05 ... 0.95, in any order: the worst tenth are 0.00 and 0.05, whose mean is 0.025.

    The mean is 0.475; the variance of 0 ... 19 is (20^2 - 1) / 12 = 33.25, so the spread is 0.05 sqrt(33.25). Losses
    are 1 to 20, of which two are null: the mean of the others is (210 - 1 - 20) / 18 = 10.5.
    """
    replies = [
        answer(f"c{number:02d}", accuracy=number / 20, loss=None if number in (0, 19) else number + 1.0)
        for number in range(20)
    ]
    found, warnings = told(*reversed(replies))
    assert warnings == []
    *own, summary = found
    assert [line["client"] for line in own] == [client.id for client in TWENTY]
    assert own[0] == {
        "round": 3, "event": "personal", "client": "c00", "tier": "phone", "top_k": 1, "adapter_top_k": 2,
        "accuracy": 0.0, "loss": None, "examples": 4,
    }  # fmt: skip
    assert (summary["round"], summary["event"], summary["clients"]) == (3, "personal_summary", 20)
    assert summary["mean"] == pytest.approx(0.475)
    assert summary["worst_decile"] == pytest.approx(0.025)
    assert summary["spread"] == pytest.approx(0.05 * math.sqrt(33.25))
    assert summary["loss_mean"] == pytest.approx(10.5)
    assert summary["seconds"] == 20.0


@pytest.mark.parametrize(
    ("accuracies", "worst"),
    [([0.5], 0.5), ([0.9, 0.2, 0.4], 0.2), ([0.1 * n for n in range(10)], 0.0), ([0.1 * n for n in range(11)], 0.05)],
    ids=["one", "three", "ten", "eleven"],
)
def test_a_tenth_is_rounded_up(accuracies: list[float], worst: float) -> None:
    assert worst_decile(accuracies, 1) == pytest.approx(worst)
    assert worst_decile([-value for value in accuracies], -1) == pytest.approx(-worst)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_the_worst_tenth_is_no_better_than_all(accuracies: list[float], random: Any) -> None:
    found = worst_decile(accuracies, 1)
    mean = math.fsum(accuracies) / len(accuracies)
    assert min(accuracies) - 1e-12 <= found <= mean + 1e-12
    shuffled = random.sample(accuracies, len(accuracies))
    assert worst_decile(shuffled, 1) == found
    assert worst_decile(accuracies, -1) >= mean - 1e-12


def with_tensors(client: str) -> Reply:
    content = Bundle({"layers.0.x": torch.zeros(1)}, {SCORES: {"accuracy": 1.0, "loss": 0.0, "examples": 1}})
    return Reply(4, client, Payload(4, client, content).to_bytes(), {"seconds": 1.0})


def not_json(client: str) -> Reply:
    """NaN, which the header of an honest payload cannot hold, put in by hand in the place of a number."""
    data = answer(client, accuracy=0.5).upload
    assert data.count(b"0.5") == 1
    return Reply(4, client, data.replace(b"0.5", b"NaN"), {"seconds": 1.0})


LIES: Mapping[str, tuple[Reply | ClientFailed, str]] = {
    "failed": (ClientFailed(4, "c01", "it is asleep"), "it is asleep"),
    "above one": (answer("c01", accuracy=2), "'accuracy' must be a number from 0 to 1, found 2"),
    "below zero": (answer("c01", accuracy=-0.01), "'accuracy' must be a number from 0 to 1"),
    "yes": (answer("c01", accuracy=True), "'accuracy' must be a number from 0 to 1, found True"),
    "none": (answer("c01", accuracy=None), "'accuracy' must be a number from 0 to 1, found None"),
    "a word": (answer("c01", accuracy="x" * 500), "'accuracy' must be"),
    "huge loss": (answer("c01", loss=1e300), "'loss' must be null or a number from 0 below"),
    "negative loss": (answer("c01", loss=-1.0), "'loss' must be null or a number from 0"),
    "endless number": (answer("c01", loss=10**400), "a number of 1329 bits"),
    "no examples": (answer("c01", examples=0), "'examples' must be a whole number from 1"),
    "half an example": (answer("c01", examples=1.5), "'examples' must be a whole number from 1"),
    "wrong round": (answer("c01", round=3), "in round 3"),
    "for another": (answer("c01", claims="c02"), "payload says it comes from 'c02'"),
    "tensors": (with_tensors("c01"), "scores and no tensors"),
    "no JSON": (not_json("c01"), "not a bundle"),
    "garbage": (Reply(4, "c01", b"\x00" * 30, {"seconds": 1.0}), "not a bundle"),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_lie_spoils_nothing(lie: str) -> None:
    reply, words = LIES[lie]
    honest = [answer(f"c{number:02d}", accuracy=number / 20) for number in range(20) if number != 1]
    found, warnings = told(*honest[:5], reply, *honest[5:])
    assert len(warnings) == 1
    assert "\n" not in warnings[0]
    assert len(warnings[0]) < 300
    assert warnings[0].startswith("round 3: no personal evaluation of c01: ")
    assert words in warnings[0]
    assert found == told(*honest)[0]
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_a_stranger_is_not_counted() -> None:
    found, warnings = told(answer("c00"), answer("c000"))
    assert [line["clients"] for line in found if line["event"] == "personal_summary"] == [1]
    assert "c000" in warnings[0]
    assert "was not asked" in warnings[0]


def test_nobody_answers() -> None:
    found, warnings = told(*(ClientFailed(4, client.id, "gone") for client in TWENTY))
    assert found == []
    assert len(warnings) == 20
