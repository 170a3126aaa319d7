from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from emberfed.checkpoint import RunFolder, check_free
from emberfed.errors import RunFolderError
from emberfed.records import Bundle, Payload


def state(value: float) -> Bundle:
    return Bundle({"x": torch.full((3,), value)}, {"note": value})


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", "seed: 0\n", {"name": "run"}, {"kind": "iid"})


def commit(folder: RunFolder, *rounds: int) -> None:
    for round in rounds:
        folder.partial(round).keep(
            "c0", Payload(round, "c0", state(round)).to_bytes(), {"client": "c0", "round": round}
        )
        exported = {"adapter_config.json": b"{}"}
        folder.commit(round, state(round), exported, [{"round": round}], [{"round": round, "client": "c0"}])


def test_rounds_come_back_and_tables_follow(folder: RunFolder) -> None:
    assert folder.latest() is None
    commit(folder, 0, 1, 2)
    found = folder.latest()
    assert found is not None
    round, newest, problems = found
    assert (round, problems, dict(newest.meta)) == (2, [], {"note": 2})
    assert torch.equal(newest.tensors["x"], state(2).tensors["x"])
    assert (folder.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n{"round": 2}\n'
    assert len((folder.path / "clients.jsonl").read_text().splitlines()) == 3
    assert not list((folder.path / "rounds").glob("*.partial"))
    folder.finish(2)
    assert (folder.path / "final" / "state.safetensors").is_file()
    folder.drop_uploads(1)
    folder.drop_uploads(1)
    assert not (folder.round_path(1) / "clients").exists()
    assert (folder.round_path(2) / "clients" / "c0.safetensors").exists()


def damage_bits(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _rename_round(path: Path) -> None:
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "round": 1}))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "bits": lambda path: damage_bits(path / "state.safetensors"),
    "cut": lambda path: (path / "state.safetensors").write_bytes(b"short"),
    "missing": lambda path: (path / "state.safetensors").unlink(),
    "no manifest": lambda path: (path / "state.json").unlink(),
    "torn manifest": lambda path: (path / "state.json").write_text('{"sha'),
    "empty manifest": lambda path: (path / "state.json").write_text('{"round": 2, "sha256": {}}'),
    "odd manifest": lambda path: (path / "state.json").write_text("[]"),
    "other round": lambda path: _rename_round(path),
    "adapter": lambda path: (path / "adapter_config.json").write_text("other"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_round_is_set_aside_and_the_one_before_is_used(folder: RunFolder, kind: str) -> None:
    commit(folder, 0, 1, 2)
    DAMAGES[kind](folder.round_path(2))
    found = folder.latest()
    assert found is not None
    round, newest, problems = found
    assert (round, dict(newest.meta)) == (1, {"note": 1})
    assert len(problems) == 1
    assert "round 2 is damaged" in problems[0]
    assert (folder.path / "rounds" / "0002.damaged-1").is_dir()
    assert (folder.path / "metrics.jsonl").read_text() == '{"round": 0}\n{"round": 1}\n'
    commit(folder, 2)
    assert folder.rounds() == [0, 1, 2]
    DAMAGES[kind](folder.round_path(2))
    assert folder.latest() is not None
    assert (folder.path / "rounds" / "0002.damaged-2").is_dir()


def test_if_every_round_is_damaged_the_run_says_so(folder: RunFolder) -> None:
    commit(folder, 0)
    DAMAGES["bits"](folder.round_path(0))
    with pytest.raises(RunFolderError, match="no whole round: round 0 is damaged"):
        folder.latest()
    with pytest.raises(RunFolderError, match=r"no whole round: 0000.damaged-1 is there"):
        folder.latest()


def test_tables_are_made_again_and_a_damaged_part_is_left_out(folder: RunFolder) -> None:
    commit(folder, 0, 1, 2)
    (folder.path / "metrics.jsonl").write_text("stale")
    (folder.round_path(1) / "clients.jsonl").write_text("damaged")
    (folder.round_path(0) / "metrics.jsonl").unlink()
    found = folder.latest()
    assert found is not None
    assert found[0] == 2
    assert found[2] == [
        "metrics.jsonl of round 0 is damaged and left out",
        "clients.jsonl of round 1 is damaged and left out",
    ]
    assert (folder.path / "metrics.jsonl").read_text() == '{"round": 1}\n{"round": 2}\n'


def test_a_start_cut_short_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        RunFolder.create(tmp_path / "run", "seed: 0\n", {"name": object()}, {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "run").mkdir()
    assert (RunFolder.create(tmp_path / "run", "seed: 0\n", {}, {}).path / "config.yaml").is_file()


def test_a_name_that_cannot_be_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="cannot be a folder"):
        check_free(tmp_path / ("x" * 300))


def test_only_whole_uploads_of_a_running_round_are_kept(folder: RunFolder) -> None:
    partial = folder.partial(1)
    assert partial.kept() == {}
    for client in ("c2", "c0", "c1", "c3", "c4"):
        partial.keep(client, Payload(1, client, state(1)).to_bytes(), {"client": client})
    clients = partial.folder / "clients"
    damage_bits(clients / "c1.safetensors")
    (clients / "c3.safetensors").unlink()
    (clients / "c4.json").write_text("{")
    assert partial.kept() == {"c0": {"client": "c0"}, "c2": {"client": "c2"}}
    assert [payload.client for payload in partial.uploads(["c0", "c2"])] == ["c0", "c2"]
    partial.discard("c0")
    partial.discard("c0")
    assert list(partial.kept()) == ["c2"]


def test_a_folder_is_never_taken_over(folder: RunFolder, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="already holds a run"):
        check_free(folder.path)
    (tmp_path / "file").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    for taken in ("file", "other"):
        with pytest.raises(RunFolderError, match="not an empty folder"):
            check_free(tmp_path / taken)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty")
    check_free(tmp_path / "absent")
    with pytest.raises(RunFolderError, match="no config.yaml"):
        RunFolder.open(tmp_path / "other")
    with pytest.raises(RunFolderError, match="does not exist"):
        RunFolder.open(tmp_path / "absent")
    assert RunFolder.open(folder.path) == folder


def test_a_second_process_is_turned_away(folder: RunFolder) -> None:
    code = f"""
from pathlib import Path
from emberfed.checkpoint import RunFolder
from emberfed.errors import RunFolderError
try:
    with RunFolder(Path({str(folder.path)!r})).locked():
        print("in")
except RunFolderError as error:
    print(error)
"""

    def attempt() -> str:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    with folder.locked():
        assert "another process is working" in attempt()
        with pytest.raises(RunFolderError, match="another process"), folder.locked():
            pass
    assert attempt() == "in\n"


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_metrics_that_cannot_be_read_are_named(folder: RunFolder, damage: str) -> None:
    commit(folder, 0, 1)
    assert [line["round"] for line in folder.metrics()] == [0, 1]
    file = folder.path / "metrics.jsonl"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(RunFolderError, match=r"metrics.jsonl cannot be read"):
        folder.metrics()


def test_small_files(folder: RunFolder) -> None:
    assert folder.read_json("run.json") == {"name": "run"}
    with pytest.raises(RunFolderError, match="cannot be read"):
        folder.read_json("absent.json")
    folder.log("warning", "something")
    entry = json.loads((folder.path / "events.jsonl").read_text())
    assert (entry["level"], entry["message"]) == ("warning", "something")
