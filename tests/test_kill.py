"""Real processes, really killed, at random moments: the resumed run has the bits of the one that ran through."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from federations import bits, config

import emberfed


def start(*arguments: str | Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "emberfed", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def written(run: Path) -> int:
    """Count tensor files; folders may be renamed meanwhile, which `os.walk` does not mind."""
    return sum(name.endswith(".safetensors") for _, _, names in os.walk(run / "rounds") for name in names)


def wait_until_written(run: Path, process: subprocess.Popen[bytes], files: int) -> None:
    """Wait until the run has that many files below rounds/, or the process ended."""
    while process.poll() is None and written(run) < files:
        time.sleep(0.002)


@pytest.mark.parametrize("attempt", [0, *(pytest.param(again, marks=pytest.mark.slow) for again in (1, 2))])
def test_killed_and_resumed_until_done(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, attempt: int) -> None:
    """SIGKILL after a random number of files and a random pause, over and over, until the run is through."""
    values = config(tiny_model_folder, tiny_data, evaluation={"every": 0})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    whole = emberfed.run(file, output=tmp_path / "whole")
    total = len(list((whole.path / "rounds").rglob("*.safetensors")))

    draw = np.random.default_rng(attempt)
    run = tmp_path / "run"
    kills = 0
    # Moments are drawn over the whole run, in order, so that every kill finds the process at work on something new.
    for files in sorted(draw.integers(1, total, size=3)):
        fresh = not (run / "config.yaml").exists()
        process = start("run", file, "--output", run) if fresh else start("resume", run)
        wait_until_written(run, process, int(files))
        time.sleep(float(draw.uniform(0, 0.05)))
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 1
    resumed = emberfed.resume(run)
    assert bits(resumed.path) == bits(whole.path)
    plain = [
        {key: value for key, value in row.items() if key in ("round", "event", "tier", "rouge_l", "loss", "replied")}
        for row in resumed.metrics()
    ]
    assert plain == [
        {key: value for key, value in row.items() if key in ("round", "event", "tier", "rouge_l", "loss", "replied")}
        for row in whole.metrics()
    ]


def test_finished_clients_of_a_killed_round_do_not_train_again(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = config(tiny_model_folder, tiny_data, training={"rounds": 1}, evaluation={"every": 0})
    values["engine"] = {"name": "flaky", "faults": {"c0": "drop", "c1": "drop"}}
    values["clients"] = {**values["clients"], "min_replies": 4}
    run = tmp_path / "run"
    with pytest.raises(emberfed.EmberfedError, match="2 of 4 clients"):
        emberfed.run(values, output=run)
    kept = run / "rounds" / "0001.partial" / "clients"
    before = {path.name: path.stat().st_mtime_ns for path in kept.glob("*.safetensors")}
    assert sorted(before) == ["c2.safetensors", "c3.safetensors"]
    written = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**written, "engine": {"name": "local"}}))
    emberfed.resume(run)
    final = run / "rounds" / "0001" / "clients"
    assert {path.name: path.stat().st_mtime_ns for path in final.glob("c[23].safetensors")} == before
    clients = [json.loads(line)["client"] for line in (run / "clients.jsonl").read_text().splitlines()]
    assert clients == ["c0", "c1", "c2", "c3"]


def test_a_full_disk_stops_the_run_and_loses_nothing(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """A real limit on file size (the operating system refuses the write) stands in for a full disk."""
    values = config(tiny_model_folder, tiny_data, training={"rounds": 1}, evaluation={"every": 0})
    whole = emberfed.run(values, output=tmp_path / "whole")
    largest = max(path.stat().st_size for path in (whole.path / "rounds" / "0001").glob("*.safetensors"))
    upload = max(path.stat().st_size for path in (whole.path / "rounds" / "0001" / "clients").glob("*.safetensors"))
    run = tmp_path / "run"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values))
    code = (
        "import resource, signal, sys\n"
        "from emberfed.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2}))\n"
        f"sys.argv = ['emberfed', 'run', {str(file)!r}, '--output', {str(run)!r}]\n"
        "main()\n"
    )
    assert upload > largest // 2
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 7, done.stderr
    assert "could not write" in done.stderr
    assert "emberfed resume" in done.stderr
    assert "Traceback" not in done.stderr
    assert bits(emberfed.resume(run).path) == bits(whole.path)
