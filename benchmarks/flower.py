"""1,000 simulated clients, 50 in each of 50 rounds: what a round costs beyond training, and whether memory stays flat.

On Flower's simulation runtime with two of Ray's processes, and for comparison on the pool and local engines. Every
client has four examples and makes one step on the built-in model. Writes `benchmarks/results/flower.json` with one row
per engine: start_seconds (before the first reply of round 1, processes and their imports and models), and of rounds
after the first seconds, beyond_seconds (without training, spread over the processes, and evaluation), and for each
round the server's resident bytes and those of it and all its processes, shared pages once (PSS).

`python -m benchmarks.flower [ROUNDS [CLIENTS [ENGINE ...]]]` measures less, and writes nothing.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, final

import psutil

import emberfed
from emberfed import events

RESULT = Path(__file__).parent / "results" / "flower.json"
ROUNDS = 50
CLIENTS = 1000
COHORT = 50
PROCESSES = 2
EXAMPLES_PER_CLIENT = 4
ENGINES = ("flower-simulation", "pool", "local")
SKIPPED = 10
"""Rounds before which memory is not looked at: caches fill, and allocators settle."""


def main(rounds: int = ROUNDS, clients: int = CLIENTS, engines: tuple[str, ...] = ENGINES) -> None:
    """Measure, print, and save if all of it was measured."""
    rows = [measured(engine, rounds, clients) for engine in engines]
    print(f"{'engine':>18} {'start s':>8} {'round s':>8} {'beyond s':>9} {'server MB':>18} {'all MB':>15}")
    for row in rows:
        server, everything = row["server_bytes"][min(SKIPPED, rounds - 1) :], row["all_bytes"]
        print(
            f"{row['engine']:>18} {row['start_seconds']:>8.1f} {row['seconds']:>8.3f} {row['beyond_seconds']:>9.3f} "
            f"{server[0] / 1e6:>7.0f} -> {server[-1] / 1e6:<6.0f} {everything[-1] / 1e6:>13.0f}"
        )
    if (rounds, clients, engines) == (ROUNDS, CLIENTS, ENGINES):
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(rows, indent=1) + "\n")


def measured(engine: str, rounds: int, clients: int) -> dict[str, Any]:
    """Run once with that engine in a process of its own and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "row.json"
        command = [sys.executable, "-m", "benchmarks.flower", "row", engine, str(rounds), str(clients), str(output)]
        subprocess.run(command, check=True)
        row: dict[str, Any] = json.loads(output.read_text())
    return row


@final
class _Gauge:
    """Notes when the first reply came, and memory after each round."""

    def __init__(self) -> None:
        """Begin to count time."""
        self.started = time.perf_counter()
        self.start_seconds: float | None = None
        self.server: list[int] = []
        self.everything: list[int] = []

    def hear(self, event: events.Event) -> None:
        """Note it."""
        if isinstance(event, events.RoundStarted) and event.round == 1:
            self.started = time.perf_counter()
        if isinstance(event, events.ClientDone):
            assert event.problem is None, event.problem
            if self.start_seconds is None:
                self.start_seconds = time.perf_counter() - self.started
        if isinstance(event, events.RoundDone) and event.round > 0:
            here = psutil.Process()
            self.server.append(here.memory_info().rss)
            self.everything.append(sum(_pss(process) for process in (here, *here.children(recursive=True))))


def row(engine: str, rounds: int, clients: int) -> dict[str, Any]:
    """Run here and return the row."""
    settings = {"name": engine} if engine == "local" else {"name": engine, "processes": PROCESSES}
    overrides = [
        f"clients.count={clients}",
        f"clients.per_round={min(COHORT, clients)}",
        f"data.limit={96 + EXAMPLES_PER_CLIENT * clients}",
        "data.partition={kind: iid}",
        f"training={{rounds: {rounds}, batch_size: {EXAMPLES_PER_CLIENT}, learning_rate: 3.0e-3, max_steps: 1}}",
        "evaluation.every=0",
        "output.keep_uploads=false",
        "evaluation.max_examples=2",
        f"engine={json.dumps(settings)}",
    ]
    gauge = _Gauge()
    with tempfile.TemporaryDirectory() as folder:
        run = emberfed.run(overrides=overrides, output=Path(folder) / "run", listen=gauge.hear)
        lines = [line for line in run.metrics() if line["event"] == "round"][1:]
    spread = 1 if engine == "local" else PROCESSES
    beyond = [line["seconds"] - line["training_seconds"] / spread - line["evaluation_seconds"] for line in lines]
    return {
        "engine": engine,
        "rounds": rounds,
        "clients": clients,
        "start_seconds": gauge.start_seconds,
        "seconds": statistics.mean(line["seconds"] for line in lines),
        "training_seconds": statistics.mean(line["training_seconds"] for line in lines),
        "beyond_seconds": statistics.mean(beyond),
        "server_bytes": gauge.server,
        "all_bytes": gauge.everything,
    }


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # it ended meanwhile
        return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["row"]:
        found = row(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
        Path(sys.argv[5]).write_text(json.dumps(found))
    else:
        given = sys.argv[1:]
        main(
            int(given[0]) if given else ROUNDS,
            int(given[1]) if given[1:] else CLIENTS,
            tuple(given[2:]) or ENGINES,
        )
