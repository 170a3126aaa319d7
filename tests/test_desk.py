"""A client's desk, without a network: the answers of a run on one machine, and what it refuses to answer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import pytest
from builders import save_tiny_family
from federations import Vision, bits, config, write_texts
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

import emberfed
from emberfed import assembly, deployment, rounds
from emberfed.checkpoint import RunFolder
from emberfed.cli import split
from emberfed.config import RunConfig, parse
from emberfed.deployment import Enrolled, Home, Roll
from emberfed.engine import Engine
from emberfed.engines.local import LocalConfig
from emberfed.errors import ConfigError, DataError, RunFolderError, StorageError
from emberfed.events import ClientDone, Event
from emberfed.flower.desk import ClientSettings, Desk
from emberfed.flower.wire import Asked, Description, Hello, answered, asked, read_answered
from emberfed.records import Assessment, Bundle, ClientFailed, Job, Payload, Question, Reply, Survey
from emberfed.seeds import Seeds


@final
@dataclass(frozen=True)
class Federation:
    """A server's part, its clients' parts of the data, and their desks."""

    checked: RunConfig
    home: Home
    folder: Path
    tiers: Mapping[str, str]

    @staticmethod
    def made(values: dict[str, Any], folder: Path) -> Federation:
        checked = parse(values)
        parts = split.split(checked, folder / "parts")
        return Federation(checked, deployment.home(checked), folder, {part.client: part.tier for part in parts})

    def desk(self, client: str, state: str | Path = "state", **changes: Any) -> Desk:
        settings = ClientSettings(client, self.tiers[client], self.folder / "parts" / client, self.state(client, state))
        return Desk(self.checked, replace(settings, **changes))

    def state(self, client: str, state: str | Path = "state") -> Path:
        return self.folder / state / client

    def hello(self, run: str = "run1", expected: Mapping[str, Any] | None = None) -> Hello:
        return Hello(run, {**self.home.expected, **(expected or {})})

    def question(self, client: str, round: int = 1) -> Job:
        """What the server asks of a client in its first rounds."""
        method = assembly.method(self.checked)
        roll = Roll("run1", tuple(Enrolled(name, tier, {"examples": 5}) for name, tier in self.tiers.items()), "")
        material = deployment.material(self.home, roll)
        state = method.init(material.model, material.budgets, Seeds(self.checked.seed).at(purpose="init"))
        (asked_,) = [one for one in material.clients if one.id == client]
        return Job(round, client, method.dispatch(state, asked_, round).to_bytes())

    def asked(self, desk: Desk, question: Question, run: str = "run1", tier: str | None = None) -> Reply | ClientFailed:
        told = Asked(self.hello(run), tier or self.tiers[question.client], question)
        found = read_answered(desk.answer(asked(told)))
        assert isinstance(found, Reply | ClientFailed)
        return found


@final
class Desks(Engine):
    """An engine whose clients are at desks: all that passes is a message's content."""

    Config = LocalConfig

    def __init__(self, federation: Federation, run: str, *, resting: bool) -> None:
        super().__init__(LocalConfig(), None)  # type: ignore[arg-type]
        self._federation = federation
        self._run = run
        self._resting = resting
        self._desks = {name: federation.desk(name) for name in federation.tiers}
        self.kinds: set[type] = set()

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        for question in questions:
            self.kinds.add(type(question))
            desk = self._desks[question.client]
            yield self._federation.asked(desk, question, self._run)
            if self._resting:
                desk.rest()

    def enrolled(self) -> list[Enrolled]:
        """Return all clients, as they describe themselves."""
        found = []
        for name, desk in self._desks.items():
            told = read_answered(desk.answer(asked(self._federation.hello("0"))))
            assert isinstance(told, Description)
            one = deployment.read_description(json.loads(json.dumps(told.told)), name, self._federation.home)
            assert isinstance(one, Enrolled), one
            found.append(one)
        return found


def served(federation: Federation, path: Path, *, resting: bool) -> tuple[Path, Desks]:
    """Run a federation whose clients sit at desks."""
    checked, home = federation.checked, federation.home
    engine = Desks(federation, "run1", resting=resting)
    material = deployment.material(home, Roll.of(engine.enrolled(), home.test))
    folder = assembly.start(checked, path, material)
    rounds.run(assembly.federation(checked, material, assembly.method(checked), engine), folder)
    return path, engine


def short(model: Path, data: Path, method: str, /, **sections: Any) -> dict[str, Any]:
    plain = {"training": {"rounds": 2, "max_steps": 1}, "evaluation": {"every": 0, "max_examples": 2}}
    return config(model, data, method={"name": method}, **{**plain, **sections})


# ------------------------------------------------------------------------------------------ the same answers


@pytest.mark.parametrize("method", ["flame", "flux"])
def test_desks_answer_as_a_run_on_one_machine_with_idle_time_and_without(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Jobs, surveys and assessments; FLUX profiles its model in idle time, or, had it none, when it is next asked."""
    values = short(tiny_model_folder, tiny_data, method, data={"client_test_share": 0.3})
    local = bits(emberfed.run(values, output=tmp_path / "local").path)
    for resting in (True, False):
        federation = Federation.made(values, tmp_path / f"resting-{resting}")
        run, engine = served(federation, tmp_path / f"run-{resting}", resting=resting)
        assert bits(run) == local
        assert engine.kinds == ({Job, Assessment, Survey} if method == "flux" else {Job, Assessment})
    assert len(local) > 2


def test_idle_work_is_done_while_resting_and_once(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """FLUX's memory after a round is the model of it; after idle time its profile, and there is nothing left to do."""
    federation = Federation.made(short(tiny_model_folder, tiny_data, "flux"), tmp_path)
    _, engine = served(federation, tmp_path / "run", resting=False)
    desk = engine._desks["c0"]
    (newest,) = sorted(federation.state("c0").rglob("000002.safetensors"))
    before = newest.read_bytes()
    desk.rest()
    after = newest.read_bytes()
    assert set(Bundle.from_bytes(before).tensors) != set(Bundle.from_bytes(after).tensors)
    newest.unlink()
    desk.rest()
    assert not newest.exists()


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose clients each have images of two of the classes."""
    folder = tmp_path_factory.mktemp("vision")
    partition = {"kind": "label", "by": "category", "labels_per_client": 2}
    values = Vision.made(folder).config(
        method={"name": "linear_probe"},
        data={"partition": partition},
        training={"rounds": 1, "max_steps": 1},
        evaluation={"every": 0, "max_examples": 2},
    )
    return Federation.made(values, folder / "federation")


def test_the_server_tells_the_classes(vision: Federation, tmp_path: Path) -> None:
    local = emberfed.run(vision.checked.values(), output=tmp_path / "local").path
    run, _ = served(vision, tmp_path / "run", resting=True)
    assert bits(run) == bits(local)
    assert len(vision.home.classes) > 2


def test_other_classes_are_named_and_the_desk_goes_on(vision: Federation) -> None:
    desk = vision.desk("c0", "other")
    for classes in (vision.home.classes[:1], (), "cat"):
        told = read_answered(desk.answer(asked(vision.hello(expected={"classes": classes}))))
        assert isinstance(told, Description)
        assert isinstance(told.told["problem"], str)
        assert "\n" not in told.told["problem"]
    assert isinstance(vision.asked(desk, vision.question("c0")), Reply)


def test_texts_too(tmp_path: Path) -> None:
    model = save_tiny_family("bert", tmp_path / "bert")
    values = short(model, write_texts(tmp_path / "data.jsonl"), "linear_probe", data={"task": "text_classification"})
    local = bits(emberfed.run(values, output=tmp_path / "local").path)
    run, _ = served(Federation.made(values, tmp_path / "federation"), tmp_path / "run", resting=True)
    assert bits(run) == local


# ------------------------------------------------------------------------------------------ what is refused


@pytest.fixture(scope="module")
def flame(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """A federation whose clients have memories."""
    return Federation.made(short(tiny_model_folder, tiny_data, "flame"), tmp_path_factory.mktemp("flame"))


@pytest.fixture(scope="module")
def desk(flame: Federation) -> Desk:
    """A client that has joined a run."""
    desk = flame.desk("c0")
    assert isinstance(flame.asked(desk, flame.question("c0")), Reply)
    return desk


def reason(answer: Reply | ClientFailed) -> str:
    assert isinstance(answer, ClientFailed)
    assert "\n" not in answer.reason
    return answer.reason


def test_another_client_s_question_is_refused(flame: Federation, desk: Desk) -> None:
    told = flame.asked(desk, flame.question("c1"))
    assert reason(told) == "asked as 'c1', but this client is 'c0'"


def test_an_unknown_tier_is_refused(flame: Federation, desk: Desk) -> None:
    told = flame.asked(desk, flame.question("c0"), "run2", tier="giant")
    assert "asked to train as tier 'giant'" in reason(told)


def test_a_desk_of_no_tier_is_refused_at_once(flame: Federation) -> None:
    with pytest.raises(ConfigError, match="tier 'smal' is not one of clients.tiers; did you mean 'small'"):
        flame.desk("c0", tier="smal")


@pytest.mark.parametrize("run", ["", "..", ".", "../x", "a/b", "/tmp", "x" * 65, "é", "a b", "a\0", "a-b", "~", "²"])
def test_a_run_whose_name_is_no_folder_is_refused(flame: Federation, desk: Desk, run: str) -> None:
    before = sorted(flame.folder.rglob("*"))
    assert "name for its run is not one of emberfed's" in reason(flame.asked(desk, flame.question("c0"), run))
    assert sorted(flame.folder.rglob("*")) == before


@settings(max_examples=60)
@given(run=st.text(min_size=1, max_size=8))
def test_no_run_writes_outside_the_client_s_folder(flame: Federation, desk: Desk, run: str) -> None:
    """Whatever a server calls its run, the one new folder is that of the name (there is no download: nobody trains)."""
    state = flame.state("c0")
    before = {path.name for path in state.iterdir()}
    failed = flame.asked(desk, Job(1, "c0", b""), run)
    after = {path.name for path in state.iterdir()}
    good = run.isascii() and run.isalnum()
    assert after - before <= ({run} if good else set())
    assert ("emberfed's" in reason(failed)) == (not good)


def test_data_that_changed_since_the_client_joined_is_refused(flame: Federation, tmp_path: Path) -> None:
    question = flame.question("c1")
    assert isinstance(flame.asked(flame.desk("c1"), question), Reply)
    others = flame.folder / "parts" / "c2"
    changed = flame.desk("c1", data=others)
    assert f"the data in {others} is not what it was when this client joined" in reason(flame.asked(changed, question))
    assert isinstance(flame.asked(changed, question, "run9"), Reply), "it is another run's data as well"
    assert isinstance(flame.asked(flame.desk("c1"), question), Reply), "put back, it goes on"
    (flame.state("c1") / "run1" / "data.json").write_text("[")
    assert "data.json cannot be read" in reason(flame.asked(flame.desk("c1"), question))


def test_what_the_server_has_otherwise_is_named_and_told_here(flame: Federation, desk: Desk) -> None:
    heard: list[Event] = []
    client = Desk(
        flame.checked, ClientSettings("c0", "small", flame.folder / "parts/c0", flame.state("c0")), heard.append
    )
    hello = flame.hello(expected={"settings adapter.rank": 7, "emberfed": "99"})
    told = read_answered(client.answer(asked(hello)))
    assert isinstance(told, Description)
    problem = str(told.told["problem"])
    assert "settings adapter.rank: the server has 7, the client 2" in problem
    assert 'emberfed: the server has "99"' in problem
    failed = client.answer(asked(Asked(hello, "small", flame.question("c0"))))
    found = read_answered(failed)
    assert isinstance(found, ClientFailed)
    assert found.reason == problem
    assert isinstance(heard[-1], ClientDone)
    assert heard[-1].problem == f"failed: {problem}"


def test_a_download_that_is_none_fails_and_the_next_is_answered(flame: Federation, desk: Desk) -> None:
    assert "not a bundle of tensors" in reason(flame.asked(desk, Job(2, "c0", b"rubbish")))
    wrong = Payload(2, "c0", Bundle()).to_bytes()
    assert reason(flame.asked(desk, Job(2, "c0", wrong)))
    assert isinstance(flame.asked(desk, flame.question("c0")), Reply)


def test_what_is_no_question_is_refused(desk: Desk) -> None:
    for content in (RecordDict(), answered(ClientFailed(1, "c0", "x"))):
        with pytest.raises(RunFolderError):
            desk.answer(content)


def test_a_desk_whose_data_or_model_is_not_there_says_so_before_a_server_is(flame: Federation, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for data in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(DataError, match=str(data)):
            flame.desk("c0", data=data).prepare()
    flame.desk("c0").prepare()


# ------------------------------------------------------------------------------------------ runs and their memories


def test_two_runs_have_memories_of_their_own(flame: Federation) -> None:
    """A client that takes part in two runs in turns answers in each as if there were no other."""
    first = flame.question("c2", 1), flame.question("c2", 2)
    alone = [flame.asked(flame.desk("c2", "alone"), question) for question in first]
    both = flame.desk("c2", "both")
    mixed = [flame.asked(both, question, run) for question in first for run in ("runA", "runB")]
    uploads = [reply.upload for reply in mixed if isinstance(reply, Reply)]
    assert uploads[0::2] == uploads[1::2] == [reply.upload for reply in alone if isinstance(reply, Reply)]
    folder = flame.state("c2", "both")
    assert sorted(path.name for path in folder.iterdir()) == ["runA", "runB"]
    kept = [sorted((folder / run / "memory").rglob("*.safetensors")) for run in ("runA", "runB")]
    assert [path.read_bytes() for path in kept[0]] == [path.read_bytes() for path in kept[1]]
    assert len(kept[0]) == 2


def test_a_question_asked_again_is_not_worked_on_again(flame: Federation, tmp_path: Path) -> None:
    """By a desk that was started anew either; measured seconds tell the same work from work done twice."""
    first, second = flame.question("c2", 1), flame.question("c2", 2)
    answers = [flame.asked(flame.desk("c2", tmp_path / "state"), first) for _ in range(2)]
    assert isinstance(answers[0], Reply)
    assert answers[0] == answers[1]
    later = flame.asked(flame.desk("c2", tmp_path / "state"), second)
    assert isinstance(later, Reply)
    assert later.round == 2
    anew = flame.asked(flame.desk("c2", tmp_path / "state"), first)
    assert isinstance(anew, Reply)
    assert anew.upload == answers[0].upload, "only the last is kept; the bits are the same"
    assert anew.measured != answers[0].measured


@pytest.mark.parametrize("damage", ["upload", "told", "gone"])
def test_a_kept_answer_that_is_damaged_is_made_again(flame: Federation, tmp_path: Path, damage: str) -> None:
    question = flame.question("c2")
    before = flame.asked(flame.desk("c2", tmp_path / "state"), question)
    folder = flame.state("c2", tmp_path / "state") / "run1" / "answers"
    assert sorted(file.name for file in folder.iterdir()) == ["job.json", "job.safetensors"]
    file = folder / ("job.json" if damage == "told" else "job.safetensors")
    if damage == "gone":
        file.unlink()
    else:
        data = file.read_bytes()
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    after = flame.asked(flame.desk("c2", tmp_path / "state"), question)
    assert isinstance(before, Reply)
    assert isinstance(after, Reply)
    assert after.upload == before.upload
    assert after.measured != before.measured


def test_a_memory_that_cannot_be_written_stops_the_client_and_not_the_server(flame: Federation, tmp_path: Path) -> None:
    """Where the state folder should be is a file; then only where the memory should be."""
    (tmp_path / "state").write_text("")
    question = flame.question("c2")
    failed = flame.asked(flame.desk("c2", state=tmp_path / "state"), question)
    assert "could not write" in reason(failed)
    (tmp_path / "later" / "c2" / "run1").mkdir(parents=True)
    (tmp_path / "later" / "c2" / "run1" / "memory").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        flame.asked(flame.desk("c2", state=tmp_path / "later"), question)


def test_a_run_folder_of_desks_is_a_deployment_s(flame: Federation, tmp_path: Path) -> None:
    run, _ = served(flame, tmp_path / "run", resting=False)
    folder = RunFolder.open(run)
    assert deployment.is_one(folder)
    assert {one.id: one.tier for one in Roll.read(folder).clients} == dict(flame.tiers)
