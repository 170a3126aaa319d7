"""What clients do while the server goes on: in a thread of its own, the same bits, and what becomes of errors in it."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, final

import pytest
import torch
from builders import tiny_model
from compact_worlds import CompactWorld, bundle_bits, loud, model_bits, played
from federations import bits, config

from emberfed import assembly, rounds
from emberfed.clients import Budget, Client
from emberfed.config import parse
from emberfed.data.tokenise import ResponseShard, ShardReport
from emberfed.engine import Clients, Engine, IdleTime
from emberfed.engines.local import LocalConfig, LocalEngine
from emberfed.errors import ClientError, StorageError
from emberfed.method import Method
from emberfed.records import Bundle, ClientFailed, FitResult, Job, Payload, Question, Reply, Survey, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig
from emberfed.worker import MemoryFolder, Worker


def question(client: str, round: int = 1) -> Job:
    return Job(round, client, Payload(round, client, Bundle()).to_bytes())


# ------------------------------------------------------------------------------------------ the engine


@final
class _Night(Clients):
    """Clients whose idle work waits until it may go on, and fails if told so."""

    def __init__(self, trouble: Exception | None = None) -> None:
        self.may_go_on = threading.Event()
        self.begun = threading.Event()
        self.worked: list[tuple[str, int]] = []
        self._trouble = trouble

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        return ClientFailed(question.round, question.client, f"answered in {threading.get_ident()}")

    def idle(self, question: Question, /) -> float:
        self.begun.set()
        assert self.may_go_on.wait(30)
        if self._trouble is not None:
            raise self._trouble
        self.worked.append((question.client, threading.get_ident()))
        return 0.25


def test_idle_work_is_done_beside_the_server_and_the_next_question_waits_for_it() -> None:
    """The server has all replies while the first client is still at work, and gets the time only when that is over."""
    clients = _Night()
    engine = LocalEngine(LocalConfig(), clients)
    here = threading.get_ident()
    replies = list(engine.map([question("a"), question("b")]))
    assert [reply.reason for reply in replies if isinstance(reply, ClientFailed)] == [f"answered in {here}"] * 2
    assert clients.begun.wait(30)
    assert engine.take_idle() == IdleTime()
    assert clients.worked == []
    clients.may_go_on.set()
    assert list(engine.map([])) == []
    assert [client for client, _ in clients.worked] == ["a", "b"]
    assert all(thread != here for _, thread in clients.worked)
    idle = engine.take_idle()
    assert idle.work_seconds == 0.5
    assert 0 <= idle.waited_seconds <= 0.5
    assert engine.take_idle() == IdleTime()
    engine.close()
    engine.close()


def test_closing_leaves_for_later_what_has_not_begun() -> None:
    """The first client's work is under way when the engine is closed, and is finished; the second's does not begin."""
    clients = _Night()
    engine = LocalEngine(LocalConfig(), clients)
    list(engine.map([question("a"), question("b")]))
    assert clients.begun.wait(30)
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert engine._closing.wait(30)
    clients.may_go_on.set()
    closing.join(30)
    assert [client for client, _ in clients.worked] == ["a"]


@pytest.mark.parametrize("way", ["ask", "close"])
def test_a_full_disk_in_idle_work_is_raised_where_the_engine_is_used_next(way: str) -> None:
    clients = _Night(StorageError("the disk is full"))
    clients.may_go_on.set()
    engine = LocalEngine(LocalConfig(), clients)
    list(engine.map([question("a")]))
    with pytest.raises(StorageError, match="the disk is full"):
        list(engine.map([])) if way == "ask" else engine.close()
    engine.close()


# ------------------------------------------------------------------------------------------ the worker


class _Options(Section):
    """What goes wrong in idle work."""

    trouble: Literal["", "client", "bug", "disk"] = ""


@final
class _Dreamer(Method):
    """A client that keeps how often it was asked, and dreams of it when idle; it sends its dreams."""

    title = "Dreamer"
    paper = "none"
    Config = _Options
    AdapterConfig = _Options
    idles = True

    def init(self, model: Any, budgets: Any, seeds: Any) -> Bundle:
        return Bundle()

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        return Payload(round, client.id, Bundle())

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        return {}

    def fit(self, model: Any, download: Any, client: Any, shard: Any, memory: Bundle, seeds: Any) -> FitResult:
        dreams = memory.tensors.get("dreams", torch.zeros(1))
        return FitResult(Bundle({"dreams": dreams}), Bundle({"days": dreams + 1}))

    def idle(self, model: Any, client: Any, shard: Any, memory: Bundle) -> Bundle:
        troubles = {"client": ClientError("sleepless"), "bug": KeyError("nightmare"), "disk": StorageError("full")}
        if self.config.trouble:
            raise troubles[self.config.trouble]
        return memory if "dreams" in memory.tensors else Bundle({"dreams": memory.tensors["days"] * 10})

    @classmethod
    def combine(cls, updates: Any, config: Any, previous: Any = None) -> dict[str, torch.Tensor]:
        return {}

    def aggregate(self, state: Bundle, uploads: Any) -> Bundle:
        return state

    def deploy(self, state: Bundle, model: Any, budget: Budget) -> Any:
        return nullcontext(model)

    def personal(self, model: Any, download: Payload, client: Client, memory: Bundle) -> Any:
        return nullcontext(model)

    def export(self, state: Bundle, model: Any) -> Mapping[str, bytes]:
        return {}


def worker(folder: Path, trouble: str = "") -> Worker:
    method = _Dreamer(_Options(trouble=trouble), _Options(), Trainer(TrainingConfig()))
    shard = ResponseShard((), ShardReport(0, 0, 0, 0, 0), 0)
    clients = {"c1": Client("c1", Budget("phone", 1), 1)}

    def assess(_: str, __: Any) -> Any:
        raise AssertionError("nobody asks")

    return Worker(method, tiny_model(), clients, lambda _: shard, MemoryFolder(folder), Seeds(0), assess)


def sent(reply: Reply | ClientFailed) -> float:
    assert isinstance(reply, Reply)
    return float(Payload.from_bytes(reply.upload).content.tensors["dreams"])


def test_idle_work_that_was_not_done_is_done_when_the_client_is_asked_again(tmp_path: Path) -> None:
    """0, then 10 (1 day), 110 (11 days), 1110: whether it idles after each round, after some, or never."""
    expected = [0, 10, 110, 1110]
    for name, idles in (("always", [1, 2, 3]), ("once", [2]), ("never", [])):
        found = []
        for round in range(1, 5):
            found.append(sent(worker(tmp_path / name).answer(question("c1", round))))
            if round in idles:
                assert worker(tmp_path / name).idle(question("c1", round)) > 0
                assert worker(tmp_path / name).idle(question("c1", round)) == 0, "it is done already"
        assert found == expected, name


def test_who_has_nothing_to_do_in_idle_time_does_nothing(tmp_path: Path) -> None:
    """A client without a memory, and one that was asked for a survey."""
    client = worker(tmp_path)
    assert client.idle(question("c1")) == 0
    client.answer(question("c1"))
    assert client.idle(Survey(1, "c1", b"")) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors")) == ["000001.safetensors"]
    assert "days" in MemoryFolder(tmp_path).read("c1", 2).tensors


@pytest.mark.parametrize(("trouble", "words"), [("client", "sleepless"), ("bug", "KeyError at test_idle.py:")])
def test_an_error_in_idle_work_is_told_when_the_client_is_asked_again(trouble: str, words: str, tmp_path: Path) -> None:
    worker(tmp_path).answer(question("c1"))
    ill = worker(tmp_path, trouble)
    ill.idle(question("c1"))
    reply = ill.answer(question("c1", 2))
    assert isinstance(reply, ClientFailed)
    assert words in reply.reason
    assert sent(worker(tmp_path).answer(question("c1", 2))) == 10, "nothing was lost"


def test_a_full_disk_in_idle_work_is_not_the_clients_fault(tmp_path: Path) -> None:
    worker(tmp_path).answer(question("c1"))
    with pytest.raises(StorageError, match="full"):
        worker(tmp_path, "disk").idle(question("c1"))


# ------------------------------------------------------------------------------------------ FLUX's profiles


@pytest.mark.parametrize("tune", ["lora", "full"])
def test_a_profile_beside_the_server_has_the_bits_of_one_by_itself(
    tune: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """While the server runs its global model, whose experts in full are written into the base meanwhile."""
    adapter = {"tune": "full", "rank": 8, "alpha": 16.0} if tune == "full" else {"tune": "lora", "rank": 2, "alpha": 4}
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"}, adapter=adapter)
    world.play(1)
    stacks = {name: tensor for name, tensor in world.state.tensors.items() if name.startswith("layers.")}
    world.state = Bundle({**world.state.tensors, **loud(stacks)}, world.state.meta)
    world.assign(2)
    client, download = world.clients["c0"], world.download("c0", 2)
    fitted = world.method.fit(
        world.model, download, client, world.shard("c0"), world.memories["c0"], Seeds(0).at(round=2, client="c0")
    )
    alone = bundle_bits(world.method.idle(world.model, client, world.shard("c0"), fitted.memory))
    before, stream, deployed = model_bits(world.model), torch.get_rng_state(), world.deployed()
    found: list[bytes] = []

    def idle() -> None:
        for _ in range(4):
            found.append(bundle_bits(world.method.idle(world.model, client, world.shard("c0"), fitted.memory)))

    kept = bundle_bits(fitted.memory)
    thread = threading.Thread(target=idle)
    thread.start()
    beside = [world.deployed() for _ in range(8)]
    thread.join(60)
    assert found == [alone] * 4
    assert all(torch.equal(one, deployed) for one in beside)
    assert (model_bits(world.model), bundle_bits(fitted.memory)) == (before, kept)
    assert torch.equal(torch.get_rng_state(), stream)
    assert alone != bundle_bits(world.memories["c0"]), "the model it was sent routes otherwise than the base"


@final
class _OnDemand(Engine):
    """An engine whose clients have no time of their own: what they did not do is done when they are asked again."""

    Config = LocalConfig

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        return (self.clients.answer(question) for question in questions)


@final
class _NoRoom(Clients):
    """Clients one of which finds the disk full when it is idle after round 1."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        return self._clients.answer(question)

    def idle(self, question: Question, /) -> float:
        if (question.client, question.round) == ("c2", 1) and isinstance(question, Job):
            raise StorageError("could not write: no space left")
        return self._clients.idle(question)


def flux(model: Path, data: Path) -> dict[str, Any]:
    evaluation = {"every": 0, "max_examples": 2}
    return config(model, data, method={"name": "flux"}, training={"rounds": 3, "max_steps": 2}, evaluation=evaluation)


def test_runs_in_which_idle_work_is_done_on_demand_or_stopped_by_a_full_disk(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """The bits are those of a run whose clients did it while the server went on; its seconds stand in the next line."""
    given = flux(tiny_model_folder, tiny_data)
    checked, materials = parse(given), assembly.Materials()
    reference = played(given, tmp_path / "reference", materials)
    told = [line for line in reference.metrics() if line["event"] == "round"]
    assert [line["round"] for line in told if line.get("idle_seconds", 0) > 0] == [2, 3]
    assert "idle_seconds" not in told[0]
    assert all(0 <= line["idle_waited_seconds"] <= line["idle_seconds"] for line in told[1:])

    material = materials.gather(checked)
    folder = assembly.start(checked, tmp_path / "later", material)
    federation = assembly.federate(checked, folder, material)
    rounds.run(replace(federation, engine=_OnDemand(LocalConfig(), federation.engine.clients)), folder)
    assert bits(folder.path) == bits(reference.path)
    assert not any("idle_seconds" in line for line in folder.metrics())

    folder = assembly.start(checked, tmp_path / "full", material)
    federation = assembly.federate(checked, folder, material)
    engine = LocalEngine(LocalConfig(), _NoRoom(federation.engine.clients))
    with pytest.raises(StorageError, match="no space left"):
        rounds.run(replace(federation, engine=engine), folder)
    engine.close()
    assert folder.rounds() == [0, 1], "the server had gone on with its round"
    assert bits(played(given, folder.path, materials).path) == bits(reference.path)


def test_methods_without_idle_work_tell_of_none(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    given = {**flux(tiny_model_folder, tiny_data), "method": {"name": "fmes"}}
    folder = played(given, tmp_path / "run", assembly.Materials())
    assert [line["round"] for line in folder.metrics() if line["event"] == "round"] == [1, 2, 3]
    assert not any("idle_seconds" in line for line in folder.metrics())
