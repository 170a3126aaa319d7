"""The worker: failures become values, memory is kept by round."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import pytest
import torch
from builders import tiny_model

from emberfed.clients import Budget, Client
from emberfed.data.tokenise import ResponseShard, ShardReport
from emberfed.errors import ClientError, RunFolderError, StorageError
from emberfed.evaluation import Score, Scores
from emberfed.evaluation.classes import ClassScore
from emberfed.method import Method
from emberfed.records import SCORES, Assessment, Bundle, ClientFailed, FitResult, Job, Payload, Reply, TensorSpec
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig
from emberfed.worker import MemoryFolder, Worker


class _Options(Section):
    """What the test method does to a client."""

    trouble: str = ""


@final
class _Diary(Method):
    """A method whose client adds 1 to what it remembers and sends it."""

    title = "Diary"
    paper = "none"
    Config = _Options
    AdapterConfig = _Options

    def init(self, model: Any, budgets: Any, seeds: Any) -> Bundle:
        return Bundle()

    def dispatch(self, state: Bundle, client: Client, round: int) -> Payload:
        return Payload(round, client.id, Bundle())

    def expects(self, state: Bundle, download: Payload) -> Mapping[str, TensorSpec]:
        return {}

    def fit(self, model: Any, download: Any, client: Any, shard: Any, memory: Bundle, seeds: Any) -> FitResult:
        troubles = {"client": ClientError("sick"), "bug": ZeroDivisionError("oops"), "disk": StorageError("full")}
        if self.config.trouble:
            raise troubles[self.config.trouble]
        days = memory.tensors.get("days", torch.zeros(1)) + 1
        return FitResult(Bundle({"days": days}), Bundle({"days": days}))

    @classmethod
    def combine(cls, updates: Any, config: Any, previous: Any = None) -> dict[str, torch.Tensor]:
        return {}

    def aggregate(self, state: Bundle, uploads: Any) -> Bundle:
        return state

    def deploy(self, state: Bundle, model: Any, budget: Budget) -> Any:
        return nullcontext(model)

    def personal(self, model: Any, download: Payload, client: Client, memory: Bundle) -> Any:
        return nullcontext(memory.tensors.get("days", torch.zeros(1)))

    def export(self, state: Bundle, model: Any) -> Mapping[str, bytes]:
        return {}


def worker(folder: Path, trouble: str = "") -> Worker:
    method = _Diary(_Options(trouble=trouble), _Options(), Trainer(TrainingConfig()))
    shard = ResponseShard((), ShardReport(0, 0, 0, 0, 0), 0)
    clients = {"c1": Client("c1", Budget("phone", 1), 1)}

    def assess(_: str, days: Any) -> Scores[Score]:
        return Scores(ClassScore(0.5, 3, float(days) / 10), {})

    return Worker(method, tiny_model(), clients, lambda _: shard, MemoryFolder(folder), Seeds(0), assess)


def job(round: int) -> Job:
    return Job(round, "c1", Payload(round, "c1", Bundle()).to_bytes())


def test_an_assessment_is_of_what_the_client_keeps_and_changes_nothing(tmp_path: Path) -> None:
    client = worker(tmp_path)
    for round in (1, 2):
        client.answer(job(round))
    question = Assessment(3, "c1", Payload(3, "c1", Bundle()).to_bytes())
    for _ in range(2):
        reply = client.answer(question)
        assert isinstance(reply, Reply)
        answer = Payload.from_bytes(reply.upload)
        assert (answer.round, answer.client, dict(answer.content.tensors)) == (3, "c1", {})
        assert answer.content.meta[SCORES] == {"accuracy": 0.2, "loss": 0.5, "examples": 3}
    assert days(client.answer(job(3))) == 3


def days(reply: Reply | ClientFailed) -> float:
    assert isinstance(reply, Reply)
    return float(Payload.from_bytes(reply.upload).content.tensors["days"])


def test_memory_goes_on_from_round_to_round_and_a_repeated_round_starts_from_the_same(tmp_path: Path) -> None:
    client = worker(tmp_path)
    assert [days(client.answer(job(round))) for round in (1, 2, 3)] == [1, 2, 3]
    assert days(client.answer(job(3))) == 3
    assert days(worker(tmp_path).answer(job(4))) == 4, "memory is on disk"
    assert [days(client.answer(job(round))) for round in range(5, 12)] == list(range(5, 12))
    assert len(list((tmp_path / "c1").iterdir())) == 3
    assert days(worker(tmp_path / "elsewhere").answer(job(9))) == 1


def test_a_client_that_remembers_nothing_leaves_no_file(tmp_path: Path) -> None:
    MemoryFolder(tmp_path).write("c1", 1, Bundle())
    assert list(tmp_path.iterdir()) == []


def test_damaged_memory_is_a_failure_of_that_client(tmp_path: Path) -> None:
    client = worker(tmp_path)
    client.answer(job(1))
    [file] = (tmp_path / "c1").iterdir()
    file.write_bytes(b"x")
    reply = client.answer(job(2))
    assert isinstance(reply, ClientFailed)
    assert "not a bundle" in reply.reason
    with pytest.raises(RunFolderError):
        client.run(job(2))


def test_failures_are_values_that_say_why(tmp_path: Path) -> None:
    sick = worker(tmp_path, "client").answer(job(1))
    assert sick == ClientFailed(1, "c1", "sick")
    bug = worker(tmp_path, "bug").answer(job(1))
    assert isinstance(bug, ClientFailed)
    assert bug.reason.startswith("ZeroDivisionError at test_worker.py:")
    assert bug.reason.endswith("oops")


def test_a_full_disk_is_not_the_clients_fault(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        worker(tmp_path, "disk").answer(job(1))


def test_measurements_stay_outside_the_payload(tmp_path: Path) -> None:
    one, other = worker(tmp_path / "a").answer(job(1)), worker(tmp_path / "b").answer(job(1))
    assert isinstance(one, Reply)
    assert isinstance(other, Reply)
    assert one.upload == other.upload
    assert one.measured["seconds"] > 0
    assert one.measured["peak_memory_bytes"] > 1e6
