"""Faults that only methods with a rank of each client's own, or with a memory on the client, can meet."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import write_config
from federations import bits, config
from test_kill import start, wait_until_written, written
from test_lora_methods import World

import emberfed
from emberfed.admission import Asked, payload_problem
from emberfed.records import Bundle, Payload

WITH_MEMORY = pytest.mark.parametrize("method", ["flame", "flora"])


def changing_cohorts(model: Path, data: Path, method: str, rounds: int, **sections: Any) -> dict[str, Any]:
    """Return a config in which two of four clients take part in each round."""
    return config(
        model,
        data,
        method={"name": method},
        clients={"per_round": 2},
        training={"rounds": rounds, "max_steps": 2},
        evaluation={"every": 0, "max_examples": 2},
        **sections,
    )


def memories(run: Path) -> dict[str, bytes]:
    """Return every file that clients keep, by name."""
    return {str(path.relative_to(run)): path.read_bytes() for path in (run / "memory").rglob("*.safetensors")}


def of_rank(upload: Payload, rank: int, only: str = "") -> Payload:
    """Return the upload with that many components, zeros for those it lacks, in tensors that begin with `only`."""

    def resized(name: str, tensor: torch.Tensor) -> torch.Tensor:
        place = {"lora_A": -2, "lora_B": -1}.get(name.rpartition(".")[2])
        if place is None or not name.startswith(only):
            return tensor
        kept = tensor.narrow(place, 0, min(rank, tensor.shape[place]))
        shape = list(tensor.shape)
        shape[place] = rank - kept.shape[place]
        return torch.cat([kept, tensor.new_zeros(shape)], dim=place)

    tensors = {name: resized(name, tensor) for name, tensor in upload.content.tensors.items()}
    return replace(upload, content=Bundle(tensors, upload.content.meta))


@pytest.mark.parametrize(
    ("rank", "only", "words"),
    [
        (4, "", None),
        (3, "", None),
        (2, "", None),
        (5, "", "expected .*2 to 4"),
        (1, "", "expected .*2 to 4"),
        (0, "", "expected .*2 to 4"),
        (3, "layers.0.", "ranks differ within the upload, found .3, 4."),
        (3, "layers.0.experts.down_proj.lora_A", "ranks differ within the upload, found .3, 4."),
    ],
)
def test_hetlora_takes_one_rank_between_the_pruned_one_and_the_one_sent(
    rank: int, only: str, words: str | None, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Pruning 0.5 of rank 4 leaves 2, the lowest tier's."""
    world = World(tiny_model_folder, tiny_data, method={"name": "hetlora", "pruning": 0.5})
    large = next(client for client in world.clients.values() if client.budget.rank == 4)
    download = world.method.dispatch(world.state, large, 1)
    asked = Asked(1, large.id, world.method.expects(world.state, download), download.content.meta["top_k"])
    problem = payload_problem(of_rank(of_rank(world.fit(1, large.id), 4), rank, only), asked)
    assert problem is None if words is None else re.search(words, str(problem))


@pytest.mark.parametrize("method", ["flexlora", "flora"])
def test_other_methods_take_the_rank_they_sent_alone(method: str, tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": method})
    client = next(client for client in world.clients.values() if client.budget.rank == 3)
    download = world.method.dispatch(world.state, client, 1)
    asked = Asked(1, client.id, world.method.expects(world.state, download), download.content.meta["top_k"])
    upload = world.fit(1, client.id)
    assert payload_problem(upload, asked) is None
    for rank in (0, 1, 2, 4):
        problem = payload_problem(of_rank(upload, rank), asked)
        assert problem is not None
        assert f"(8, {rank}, 16), expected (8, 3, 16)" in problem


@pytest.mark.slow
@WITH_MEMORY
def test_killed_and_resumed_clients_keep_what_they_would_have_kept(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """SIGKILL in the second of three rounds, when some of its clients have written their memory."""
    values = changing_cohorts(tiny_model_folder, tiny_data, method, 3)
    whole = emberfed.run(values, output=tmp_path / "whole").path
    run = tmp_path / "run"
    process = start("run", write_config(tmp_path / "config.yaml", values), "--output", run)
    wait_until_written(run, process, 1 + written(whole) // 2)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    emberfed.resume(run)
    assert bits(run) == bits(whole)
    assert memories(run) == memories(whole) != {}


@WITH_MEMORY
def test_two_damaged_rounds_are_made_again_from_the_memories_before_them(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = changing_cohorts(tiny_model_folder, tiny_data, method, 4)
    whole = emberfed.run(values, output=tmp_path / "whole").path
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    for round in ("0003", "0004"):
        state = run / "rounds" / round / "state.safetensors"
        state.write_bytes(state.read_bytes()[:-1] + b"x")
    emberfed.resume(run)
    assert bits(run) == bits(whole)
    assert memories(run) == memories(whole)


def test_flora_goes_on_without_the_clients_that_failed(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Who missed a round is sent it with the next one: in round 2 two fail, in round 3 all take part again."""
    engine = {"name": "flaky", "faults": {"c0": "drop", "c1": "nan"}, "rounds": [2]}
    values = changing_cohorts(tiny_model_folder, tiny_data, "flora", 3, engine=engine)
    values["clients"]["per_round"] = None
    run = emberfed.run(values, output=tmp_path / "run")
    rounds = [line for line in run.metrics() if line["event"] == "round"]
    assert [line["replied"] for line in rounds] == [["c0", "c1", "c2", "c3"], ["c2", "c3"], ["c0", "c1", "c2", "c3"]]
    lines = [json.loads(line) for line in (run.path / "clients.jsonl").read_text().splitlines()]
    down = {(line["round"], line["client"]): line["bytes_down"] for line in lines}
    # c0's upload of round 2 was dropped: the server does not know what it has merged and sends rounds 1 and 2.
    assert down[3, "c0"] > down[3, "c2"] > 0
