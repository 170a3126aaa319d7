"""`emberfed data split`: what it writes and says, and that a client reads its part as a run would have given it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from builders import save_tiny_family
from commands import invoke, write_config
from federations import config, write_data

from emberfed import assembly
from emberfed import config as configuration
from emberfed.own_data import own_shards
from emberfed.seeds import Seeds

MODELS = {"generation": "olmoe", "text_classification": "bert", "image_classification": "vit"}


def written(folder: Path, task: str, **data: Any) -> Path:
    """A configuration of four clients with its model and data, below `folder`."""
    model = save_tiny_family(MODELS[task], folder / "model")
    values = config(model, write_data(task, folder), data={"task": task, **data})
    return write_config(folder / "federation.yaml", values)


def documented(*arguments: str | Path) -> Mapping[str, Any]:
    result = invoke("data", "split", *arguments, "--json")
    assert result.exit_code == 0, result.stderr
    document: Mapping[str, Any] = json.loads(result.stdout)
    return document


def test_help_has_an_example() -> None:
    result = invoke("data", "split", "--help")
    assert "Example: emberfed data split" in result.stdout
    assert "--json" in result.stdout


@pytest.mark.parametrize("task", MODELS)
def test_a_client_reads_its_part_as_a_run_gives_it(tmp_path: Path, task: str) -> None:
    """Tiers and examples are those that the run enrols its clients with."""
    file, parts = written(tmp_path, task, client_test_share=0.2), tmp_path / "parts"
    document = documented(file, "--output", parts)
    assert document["output"] == str(parts)
    run = configuration.load(file)
    material = assembly.gather(run)
    classes = run.task.corpus(run.data, Seeds(run.seed)).classes
    assert [line["client"] for line in document["clients"]] == ["c0", "c1", "c2", "c3"]
    for line, client in zip(document["clients"], material.clients, strict=True):
        assert (line["tier"], line["examples"]) == (client.budget.tier, client.examples)
        assert line["kept_apart"] == len(material.held_out[client.id].examples)
        own = own_shards(
            run.task,
            run.data,
            Path(line["folder"]),
            material.processor,
            classes,
            client.id,
            Seeds(run.seed),
        )
        assert own.train.digest() == material.shards[client.id].digest()
        assert own.held_out is not None
        assert own.held_out.digest() == material.held_out[client.id].digest()
    assert sorted(path.name for path in parts.rglob("*")) == ["c0", "c1", "c2", "c3", *["data.parquet"] * 4]


def test_a_table_and_a_command_to_go_on_with(tmp_path: Path) -> None:
    file = written(tmp_path, "generation")
    result = invoke("data", "split", file, "--output", tmp_path / "my parts", "--set", "clients.count=5")
    assert result.exit_code == 0
    assert result.stderr == ""
    assert [line.split()[0] for line in result.stdout.splitlines() if line.startswith(" c")] == [
        "c0", "c1", "c2", "c3", "c4",
    ]  # fmt: skip
    assert "Kept apart" not in result.stdout
    assert result.stdout.splitlines()[-1].startswith("emberfed client CONFIG --server HOST:PORT")
    assert f" --name c0 --tier small --data '{tmp_path}/my parts/c0'" in result.stdout
    kept = invoke(
        "data", "split", file, "--output", tmp_path / "other", "--set", "data.client_test_share=0.2",
    )  # fmt: skip
    assert "Kept apart" in kept.stdout


def test_the_same_again_writes_the_same(tmp_path: Path) -> None:
    file = written(tmp_path, "image_classification")
    for name in ("one", "two"):
        documented(file, "--output", tmp_path / name)
    for client in ("c0", "c1", "c2", "c3"):
        one, two = ((tmp_path / name / client / "data.parquet").read_bytes() for name in ("one", "two"))
        assert one == two


@pytest.mark.parametrize(
    ("changes", "code", "line"),
    [
        (("clients.count=40",), 3, "clients"),
        (("data.path=absent.jsonl",), 3, "there is no such file or folder"),
        (("data.partition.by=nothing",), 3, "has no column 'nothing'"),
        (("clients.nothing=1",), 2, "nothing"),
    ],
)
def test_what_cannot_be_divided_leaves_nothing(tmp_path: Path, changes: tuple[str, ...], code: int, line: str) -> None:
    file = written(tmp_path, "generation")
    before = sorted(path.name for path in tmp_path.iterdir())
    settings = [part for change in changes for part in ("--set", change)]
    result = invoke("data", "split", file, "--output", tmp_path / "parts", *settings)
    assert result.exit_code == code
    assert result.stderr.startswith("emberfed: error: ")
    assert result.stderr.count("\n") == 1
    assert line in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    file = written(tmp_path, "generation")
    (tmp_path / "parts").mkdir()
    documented(file, "--output", tmp_path / "parts")
    result = invoke("data", "split", file, "--output", tmp_path / "parts")
    assert result.exit_code == 5
    assert "is not an empty folder" in result.stderr
    (tmp_path / "file").write_text("in the way")
    assert invoke("data", "split", file, "--output", tmp_path / "file").exit_code == 5
    assert (tmp_path / "file").read_text() == "in the way"
    assert invoke("data", "split", file, "--output", tmp_path / "file" / "parts").exit_code == 7
