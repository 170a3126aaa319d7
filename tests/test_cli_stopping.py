"""Stopping the command line loses nothing, and neither do readers that go away."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import invoke, start, write_config
from federations import bits, config

import emberfed
from emberfed import events
from emberfed.cli.stopping import Stop, resumable
from emberfed.errors import Interrupted


def read_until(process: subprocess.Popen[str], beginning: str) -> list[str]:
    """Read the process's progress up to the line that begins so."""
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if line.startswith(beginning):
            return lines
    raise AssertionError(f"no line begins with {beginning!r}: {lines}")


def test_interrupted_terminated_resumed_same_bits(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A real Ctrl-C in round 1, a real SIGTERM in round 2: the finished clients stay, and the bits are the same."""
    training = {"rounds": 2, "local_epochs": 8}
    values = config(tiny_model_folder, tiny_data, training=training, evaluation={"every": 0, "max_examples": 2})
    file, path = write_config(tmp_path / "slow.yaml", values), tmp_path / "run"
    whole = emberfed.run(file, output=tmp_path / "whole")

    process = start("run", file, "--output", path, "--json")
    read_until(process, "round 1: client c0 done")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == Interrupted.exit_code
    message = f"stopped; finished clients are kept. Go on with: emberfed resume {path}"
    assert err.splitlines()[-1] == f"emberfed: {message}"
    assert "Traceback" not in err
    assert json.loads(out) == {"error": message, "exit_code": Interrupted.exit_code}

    process = start("resume", path)
    lines = read_until(process, "round 2: client c1 done")
    waiting = next(int(line.split()[4]) for line in lines if line.startswith("round 1 of 2: "))
    assert waiting < 4, "c0 was kept"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == Interrupted.exit_code
    assert (out, err.splitlines()[-1]) == ("", f"emberfed: {message}")
    assert not (path / "final").exists()

    result = invoke("resume", path)
    assert result.exit_code == 0, result.stderr
    assert bits(path) == bits(whole.path)


def test_stopped_before_anything_was_written(tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match="nothing was written"), resumable(tmp_path):
        raise KeyboardInterrupt


def test_a_lost_interrupt_comes_back_with_the_next_event() -> None:
    """Python drops exceptions raised in destructors; a stop that fell into one must not be forgotten."""
    stop = Stop()
    heard: list[events.Event] = []
    listen = stop.before(heard.append)
    first, second = events.Notice("warning", "one"), events.Notice("warning", "two")
    before = signal.getsignal(signal.SIGINT)
    with stop.on_signals():
        listen(first)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL, "a second Ctrl-C kills"
        with pytest.raises(KeyboardInterrupt):
            listen(second)
    assert heard == [first]
    assert signal.getsignal(signal.SIGINT) is before


@pytest.fixture
def closed_pipe() -> Iterator[int]:
    """The writing end of a pipe nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


def test_a_closed_standard_output_is_no_traceback(closed_pipe: int) -> None:
    command = [sys.executable, "-m", "emberfed", "models", "--json"]
    done = subprocess.run(command, stdout=closed_pipe, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""


@pytest.mark.slow
def test_a_closed_standard_error_does_not_fail_clients(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, closed_pipe: int
) -> None:
    """Whoever read the progress went away (`2>&1 | head`): the run goes on unseen, to the end."""
    file, path = tmp_path / "config.yaml", tmp_path / "run"
    write_config(file, config(tiny_model_folder, tiny_data, training={"rounds": 1}, evaluation={"every": 0}))
    command = [sys.executable, "-m", "emberfed", "run", str(file), "--output", str(path), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=closed_pipe, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["problems"] == []
    assert (path / "report.html").is_file()


def test_interrupted_while_a_library_runs_source(tmp_path: Path) -> None:
    """CPython ends by SIGINT when KeyboardInterrupt itself once left an `exec` of source; ours must not (code 130)."""
    (tmp_path / "interrupted.py").write_text(
        "from emberfed.cli.stopping import Stop\n"
        "try:\n"
        "    with Stop().on_signals():\n"
        "        exec('import signal; signal.raise_signal(signal.SIGINT)')\n"
        "except KeyboardInterrupt:\n"
        "    raise SystemExit(130)\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    done = subprocess.run(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interruption_that_a_library_turned_into_an_error_is_still_one() -> None:
    def library() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not go on") from None

    with pytest.raises(KeyboardInterrupt), Stop().on_signals():
        library()
    with pytest.raises(ValueError, match="its own"), Stop().on_signals():
        raise ValueError("its own")
