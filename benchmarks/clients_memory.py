"""Does memory grow with the number of clients, and how much of a round is not training or evaluation?

8 and 64 clients with 48 examples each, one round, in child processes taken in turns.
Writes `benchmarks/results/clients_memory.json` with one row per run: clients, peak_memory_bytes (of the whole
process, from the operating system), round seconds, seconds outside training and evaluation, their share.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "clients_memory.json"
REPEATS = 2
CLIENTS = (8, 64)
EXAMPLES_PER_CLIENT = 48


def main() -> None:
    """Measure, print and save."""
    rows = [measure(clients) for _ in range(REPEATS) for clients in CLIENTS]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{'clients':>8} {'peak MB':>9} {'round s':>8} {'outside s':>10} {'share':>7}")
    for row in rows:
        print(
            f"{row['clients']:>8} {row['peak_memory_bytes'] / 1e6:>9.1f} {row['seconds']:>8.2f} "
            f"{row['overhead_seconds']:>10.3f} {row['overhead_share']:>7.2%}"
        )
    few, many = (
        statistics.mean(row["peak_memory_bytes"] for row in rows if row["clients"] == clients) for clients in CLIENTS
    )
    print(f"peak memory with {CLIENTS[1]} clients is {many / few - 1:+.1%} of that with {CLIENTS[0]}")


def measure(clients: int) -> dict[str, Any]:
    """Run the quickstart's world once with that many clients and return its row."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        settings = [
            f"clients.count={clients}",
            f"data.limit={96 + EXAMPLES_PER_CLIENT * clients}",
            "data.partition={kind: iid}",
            "training.rounds=1",
            "evaluation.every=0",
        ]
        options = [word for setting in settings for word in ("--set", setting)]
        child = os.posix_spawn(
            sys.executable,
            [sys.executable, "-m", "emberfed", "run", "--output", str(path), "--json", *options],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
        )
        _, status, usage = os.wait4(child, 0)
        if status != 0:
            raise SystemExit(f"the run with {clients} clients failed with status {status}")
        rounds = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rounds = [line for line in rounds if line["event"] == "round"]
    seconds = statistics.mean(line["seconds"] for line in rounds)
    overhead = statistics.mean(line["overhead_seconds"] for line in rounds)
    return {
        "clients": clients,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "seconds": seconds,
        "overhead_seconds": overhead,
        "overhead_share": overhead / seconds,
    }


if __name__ == "__main__":
    main()
