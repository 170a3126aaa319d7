"""What a round asks before training: who is asked, once each, and what becomes of clients that answer badly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from compact_worlds import played
from federations import bits, config

from emberfed import assembly, events, rounds
from emberfed.clients import Budget, Client
from emberfed.config import parse
from emberfed.engine import Engine
from emberfed.engines.flaky import Fault, spoil
from emberfed.engines.local import LocalConfig
from emberfed.errors import RoundFailed
from emberfed.records import Bundle, ClientFailed, Payload, Question, Reply, TensorSpec
from emberfed.surveys import Surveys

SPECS = {"use": TensorSpec((2, 3), torch.int64)}
BUDGET = Budget("all", 2)


def surveys(*ids: str) -> Surveys:
    return Surveys([Client(id_, BUDGET, 5) for id_ in ids], SPECS, 4)


def answer(client: str) -> Reply:
    content = Bundle({"use": torch.arange(6).view(2, 3)})
    return Reply(4, client, Payload(4, client, content).to_bytes(), {"seconds": 1.0})


def test_each_client_is_asked_once_by_name_and_answers_are_sorted() -> None:
    asked = surveys("c2", "c1", "c3")
    questions = list(asked.questions())
    assert [(question.round, question.client) for question in questions] == [(4, "c1"), (4, "c2"), (4, "c3")]
    for question in questions:
        told = Payload.from_bytes(question.download)
        assert (told.round, told.client, dict(told.content.tensors)) == (4, question.client, {})
    for client in ("c3", "c1", "c2"):
        asked.receive(answer(client))
    assert [payload.client for payload in asked.payloads()] == ["c1", "c2", "c3"]
    assert asked.failed == {}
    assert all(torch.equal(p.content.tensors["use"], torch.arange(6).view(2, 3)) for p in asked.payloads())


def test_a_stranger_s_answer_counts_nowhere() -> None:
    asked = surveys("c1")
    asked.receive(answer("c9"))
    assert (asked.payloads(), asked.failed) == ([], {})


@pytest.mark.parametrize("failed_first", [False, True])
def test_of_a_client_that_answers_twice_neither_answer_counts(failed_first: bool) -> None:
    asked = surveys("c1", "c2")
    asked.receive(ClientFailed(4, "c1", "ill") if failed_first else answer("c1"))
    for _ in range(2):
        asked.receive(answer("c1"))
    asked.receive(answer("c2"))
    assert asked.failed == {"c1": "survey: answered twice"}
    assert [payload.client for payload in asked.payloads()] == ["c2"]


def test_a_failure_says_why() -> None:
    asked = surveys("c1")
    asked.receive(ClientFailed(4, "c1", "no reply"))
    assert (asked.payloads(), asked.failed) == ([], {"c1": "survey: no reply"})


WORDS: dict[Fault, str] = {
    "nan": "tensor 'use': negative counts",
    "shape": r"tensor 'use': shape (2, 1), expected (2, 3)",
    "dtype": "tensor 'use': dtype torch.float64, expected torch.int64",
    "missing": "tensor 'use' is missing",
    "foreign": "foreign tensor 'a.stranger'",
    "old_round": "payload says it comes from 'c1' in round 3",
    "garbage": "are not a bundle of tensors",
    "stranger": "payload says it comes from 'nobody' in round 4",
}
"""What is said of a survey that is spoiled; counts have no NaN, so that they are made negative."""


def test_every_fault_is_told_here_or_is_none_of_a_survey() -> None:
    assert set(WORDS) | {"drop", "raise", "twice", "weight"} == set(get_args(Fault))


@pytest.mark.parametrize("fault", WORDS)
def test_answers_that_cannot_be_used_are_refused(fault: Fault) -> None:
    asked, good = surveys("c1", "c2"), answer("c1")
    asked.receive(replace(good, upload=spoil(good.upload, fault)))
    asked.receive(answer("c2"))
    assert asked.failed.keys() == {"c1"}
    assert asked.failed["c1"].startswith("survey: ")
    assert WORDS[fault] in asked.failed["c1"]
    assert [payload.client for payload in asked.payloads()] == ["c2"]


# ------------------------------------------------------------------------------------------ whole rounds


class _Asking(Engine):
    """The local engine without idle time, which writes down whom it asks for what."""

    Config = LocalConfig

    def __init__(self, inner: Engine) -> None:
        super().__init__(LocalConfig(), inner.clients)
        self.asked: list[tuple[str, int, str]] = []

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        for question in questions:
            self.asked.append((type(question).__name__, question.round, question.client))
            yield self.clients.answer(question)


def values(model: Path, data: Path, method: str, **sections: Any) -> dict[str, Any]:
    plain = {"training": {"rounds": 3, "max_steps": 1}, "evaluation": {"every": 0, "max_examples": 2}}
    return config(model, data, method={"name": method}, **{**plain, **sections})


@pytest.mark.parametrize("method", ["flux", "fmes"])
def test_clients_are_surveyed_before_they_first_train_and_never_again(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Two of four in each round; a resume asks nobody twice either."""
    checked = parse(values(tiny_model_folder, tiny_data, method, clients={"per_round": 2}))
    material = assembly.gather(checked)
    folder = assembly.start(checked, tmp_path / "run", material)
    federation = assembly.federate(checked, folder, material)
    first = _Asking(federation.engine)
    rounds.run(replace(federation, engine=first, rounds=1), folder)
    again = assembly.federate(checked, folder, material)
    second = _Asking(again.engine)
    rounds.run(replace(again, engine=second), folder)
    asked = [*first.asked, *second.asked]
    surveyed = [(round, client) for kind, round, client in asked if kind == "Survey"]
    debuts: dict[str, int] = {}
    for kind, round, client in asked:
        if kind == "Job":
            debuts.setdefault(client, round)
    assert surveyed == sorted((round, client) for client, round in debuts.items())
    assert len({round for round, _ in surveyed}) > 1, "or nobody came late"
    for round in range(1, 4):
        kinds = [kind for kind, of, _ in asked if of == round]
        assert kinds == sorted(kinds, key=["Survey", "Job"].index), "surveys come first"


def test_other_methods_ask_for_none(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    checked = parse(values(tiny_model_folder, tiny_data, "fmq", training={"rounds": 1, "max_steps": 1}))
    material = assembly.gather(checked)
    folder = assembly.start(checked, tmp_path / "run", material)
    federation = assembly.federate(checked, folder, material)
    engine = _Asking(federation.engine)
    rounds.run(replace(federation, engine=engine), folder)
    assert {kind for kind, _, _ in engine.asked} == {"Job"}
    with pytest.raises(NotImplementedError, match="FMQ asks no client for a survey"):
        federation.method.survey(material.model, material.clients[0], material.shards["c0"], Bundle(), federation.seeds)
    memory = Bundle(meta={"any": 1})
    assert federation.method.idle(material.model, material.clients[0], material.shards["c0"], memory) is memory


@pytest.mark.parametrize("method", ["flux", "fmes"])
def test_a_client_without_a_survey_is_left_out_of_the_round_by_name_and_asked_again(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Whatever is wrong with it, the round is that of the others; in the next one the client takes part."""
    materials = assembly.Materials()
    found = {}
    for fault, words in {"nan": "negative counts", "twice": "answered twice"}.items():
        engine = {"name": "flaky", "faults": {"c1": fault}, "rounds": [1]}
        given = values(tiny_model_folder, tiny_data, method, training={"rounds": 2, "max_steps": 1}, engine=engine)
        heard: list[events.Event] = []
        run = played(given, tmp_path / fault, materials, heard.append)
        first, second = (line for line in run.metrics() if line["event"] == "round")
        assert first["replied"] == ["c0", "c2", "c3"]
        assert words in first["failed"]["c1"]
        assert first["failed"]["c1"].startswith("survey: ")
        assert first["refused"] == second["failed"] == second["refused"] == {}
        assert second["replied"] == ["c0", "c1", "c2", "c3"]
        told = [event for event in heard if isinstance(event, events.ClientDone) and event.problem is not None]
        assert [(event.round, event.client) for event in told] == [(1, "c1")]
        assert "survey" in (run.path / "events.jsonl").read_text()
        found[fault] = bits(run.path)
    assert found["nan"] == found["twice"]


def test_too_few_surveys_fail_the_round_which_can_be_resumed(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """One client has no survey, another's upload is garbage: 2 of the 4 that were asked are left, where 3 are needed.

    Once the network is good again, the round has the bits of one that went well at once.
    """
    materials = assembly.Materials()
    given = values(tiny_model_folder, tiny_data, "flux", training={"rounds": 1, "max_steps": 1})
    given["clients"] = {**given["clients"], "min_replies": 3}
    whole = played(given, tmp_path / "whole", materials)
    engine = {"name": "flaky", "faults": {"c1": "drop", "c3": "weight"}}
    with pytest.raises(RoundFailed, match=r"2 of 4 clients .*\(c1 failed: survey: no reply .*; c3 refused: 'examples'"):
        played({**given, "engine": engine}, tmp_path / "run", materials)
    assert bits(played(given, tmp_path / "run", materials).path) == bits(whole.path)


def test_without_any_survey_nobody_trains(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    given = values(tiny_model_folder, tiny_data, "flux", training={"rounds": 1, "max_steps": 1})
    engine = {"name": "flaky", "faults": dict.fromkeys(("c0", "c1", "c2", "c3"), "garbage")}
    with pytest.raises(RoundFailed, match=r"0 of 4 clients .*c3 failed: survey: .* not a bundle") as caught:
        played({**given, "engine": engine}, tmp_path / "run", assembly.Materials())
    assert "\n" not in str(caught.value)


def test_a_client_whose_survey_fails_after_its_upload_was_kept_is_left_out(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The round was cut after the upload; its survey is asked for again then, since no state tells of it yet."""
    materials = assembly.Materials()
    given = values(tiny_model_folder, tiny_data, "flux", training={"rounds": 1, "max_steps": 1})
    given["clients"] = {**given["clients"], "min_replies": 3}
    with pytest.raises(RoundFailed, match="2 of 4 clients"):
        played(
            {**given, "engine": {"name": "flaky", "faults": {"c2": "drop", "c3": "drop"}}}, tmp_path / "run", materials
        )
    kept = tmp_path / "run" / "rounds" / "0001.partial" / "clients"
    assert sorted(path.stem for path in kept.glob("*.safetensors")) == ["c0", "c1"]
    run = played({**given, "engine": {"name": "flaky", "faults": {"c1": "nan"}}}, tmp_path / "run", materials)
    line = run.metrics()[-1]
    assert line["replied"] == ["c0", "c2", "c3"]
    assert line["failed"] == {"c1": "survey: tensor 'reach': negative counts"}
    assert sorted(path.stem for path in (run.path / "rounds" / "0001" / "clients").glob("*.safetensors")) == [
        "c0",
        "c2",
        "c3",
    ]
