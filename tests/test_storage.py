from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emberfed import storage
from emberfed.errors import StorageError


def test_a_file_appears_whole_with_its_folders_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    storage.write(path, b"one")
    storage.write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    """A real limit on file size stands in for a full disk: the operating system refuses in the middle of a write."""
    path = tmp_path / "file"
    storage.write(path, b"old")
    code = f"""
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
from pathlib import Path
from emberfed import storage
from emberfed.errors import StorageError
try:
    storage.write(Path({str(path)!r}), b"x" * 5000)
except StorageError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "could not write" in done.stdout
    assert "resume" in done.stdout
    assert done.stdout.count("\n") == 1
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full, an always full disk")
def test_a_full_disk_is_named() -> None:
    with (
        pytest.raises(StorageError, match="the disk is full"),
        storage.explained(Path("x")),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


def test_a_folder_in_the_way_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"):
        storage.write(tmp_path / "file" / "x", b"")
    with pytest.raises(StorageError, match="could not write"):
        storage.append_line(tmp_path / "file" / "x", {})


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "lines"
    storage.append_line(path, {"b": 1, "a": [2]})
    storage.append_line(path, {"c": None})
    assert path.read_bytes() == b'{"b": 1, "a": [2]}\n{"c": null}\n' == storage.lines([{"b": 1, "a": [2]}, {"c": None}])
    with pytest.raises(ValueError, match="JSON"):
        storage.lines([{"x": float("nan")}])
    storage.write_json(path, {"b": 1, "a": 2})
    assert path.read_text() == '{\n "a": 2,\n "b": 1\n}\n'


def test_a_link_is_moved_in_one_step(tmp_path: Path) -> None:
    link = tmp_path / "final"
    storage.point(link, "rounds/0001")
    storage.point(link, "rounds/0002")
    assert link.readlink() == Path("rounds/0002")
    assert [entry.name for entry in tmp_path.iterdir()] == ["final"]


def test_a_folder_appears_when_all_of_it_is_written(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    with storage.new_folder(target) as filled:
        storage.write(filled / "file", b"x")
        assert not target.exists()
    assert (target / "file").read_bytes() == b"x"
    assert [path.name for path in target.parent.iterdir()] == ["new"]


def test_a_folder_that_could_not_be_written_is_gone(tmp_path: Path) -> None:
    def stopped() -> None:
        with storage.new_folder(tmp_path / "new") as filled:
            storage.write(filled / "file", b"x")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write"), storage.new_folder(tmp_path / "file" / "new"):
        pass


def test_what_a_killed_attempt_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from emberfed import storage
with storage.new_folder(Path({str(tmp_path / "new")!r})) as filled:
    storage.write(filled / "file", b"x")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    assert (left / "file").exists()
    others = {".new.01234567.tmp.d", ".new.0123456.tmp", ".newer.01234567.tmp", "new.01234567.tmp", ".new.0123456x.tmp"}
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".new.00000000.tmp").write_text("a file")
    (tmp_path / ".new.11111111.tmp").symlink_to(tmp_path / "new.01234567.tmp")
    (tmp_path / ".new.22222222.tmp").mkdir()
    at_work = os.open(tmp_path / ".new.22222222.tmp", os.O_RDONLY)
    fcntl.flock(at_work, fcntl.LOCK_EX)
    others |= {".new.00000000.tmp", ".new.11111111.tmp", ".new.22222222.tmp"}
    with storage.new_folder(tmp_path / "new"):
        assert not left.exists()
    os.close(at_work)
    assert {path.name for path in tmp_path.iterdir()} == others | {"new"}


def test_two_attempts_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    with storage.new_folder(tmp_path / "new") as first:
        storage.write(first / "one", b"")
        with pytest.raises(KeyboardInterrupt), storage.new_folder(tmp_path / "new"):
            raise KeyboardInterrupt
        assert (first / "one").exists()
    assert (tmp_path / "new" / "one").exists()
