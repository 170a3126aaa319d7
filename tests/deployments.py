"""Deployments as their users start them: a server and clients as processes on the loopback, with certificates."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import yaml

import emberfed
from emberfed.cli import split
from emberfed.config import parse
from emberfed.flower import certificates

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@final
@dataclass
class Grounds:
    """A federation's folders, and the processes that were started in them.

    Attributes:
        path: The folder of all.
        config: The configuration's file.
        tiers: Each client's tier, by its id.
        port: Where the server listens.
    """

    path: Path
    config: Path
    tiers: Mapping[str, str]
    port: int
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The server's run."""
        return self.path / "served"

    def server(self, *options: str, output: Path | None = None, log: str = "server") -> subprocess.Popen[bytes]:
        """Start the server."""
        places = ["--output", str(output or self.run), "--state", str(self.path / "server-state")]
        own = ["--certificates", str(self.path / "certificates/server"), "--port", str(self.port)]
        return self.start(log, "server", str(self.config), *places, *own, *options)

    def client(self, name: str, *options: str, log: str | None = None) -> subprocess.Popen[bytes]:
        """Start a client."""
        own = ["--data", str(self.path / "parts" / name), "--tier", self.tiers[name]]
        own += ["--certificates", str(self.path / "certificates" / name), "--state", str(self.path / f"state-{name}")]
        return self.start(log or name, "client", str(self.config), "--server", f"localhost:{self.port}", *own, *options)

    def clients(self, *options: str) -> dict[str, subprocess.Popen[bytes]]:
        """Start all clients."""
        return {name: self.client(name, *options) for name in self.tiers}

    def start(self, log: str, *command: str) -> subprocess.Popen[bytes]:
        """Start an emberfed command whose output goes to a file; a second process's follows the first's."""
        return self.start_python(log, "-m", "emberfed", *command)

    def start_python(self, log: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start Python in the same way."""
        with (self.path / f"{log}.log").open("ab") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                cwd=self.path,
                env=ENVIRONMENT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def log(self, name: str) -> str:
        """What a process has written."""
        file = self.path / f"{name}.log"
        return file.read_text() if file.exists() else ""

    def wait_for(self, name: str, text: str, seconds: float = 120.0) -> None:
        """Wait until a process has written something."""
        wait_until(lambda: text in self.log(name), seconds, lambda: f"{name} never wrote {text!r}:\n{self.log(name)}")

    def ended(self, process: subprocess.Popen[bytes], seconds: float = 180.0) -> int:
        """Return a process's exit code."""
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError("still running:\n" + "\n".join(self.everything())) from None

    def everything(self) -> list[str]:
        """All that all processes wrote."""
        return [f"--- {file.stem}\n{file.read_text()}" for file in sorted(self.path.glob("*.log"))]

    def stop(self) -> None:
        """End all processes: at first as a user would, then by force."""
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
        until = time.monotonic() + 20
        for process in self.processes:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(
    done: Callable[[], bool], seconds: float, complaint: Callable[[], str] = lambda: "it did not happen"
) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < until, complaint()
        time.sleep(0.05)


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def grounds(path: Path, values: Mapping[str, Any], names: Sequence[str] | None = None) -> Iterator[Grounds]:
    """Make a federation's folders: clients' parts of the data, certificates, configuration; end what runs there.

    Args:
        path: Where.
        values: The configuration, as for a run on one machine.
        names: Clients that get certificates; None: all that there are.
    """
    path.mkdir(exist_ok=True)
    config = path / "config.yaml"
    config.write_text(yaml.safe_dump(dict(values)))
    parts = split.split(parse(values), path / "parts")
    tiers = {part.client: part.tier for part in parts}
    certificates.make(path / "certificates", ["localhost"], list(tiers) if names is None else names, 30)
    made = Grounds(path, config, tiers, free_port())
    try:
        yield made
    finally:
        made.stop()


def here(values: Mapping[str, Any], path: Path) -> Path:
    """Run the same federation on this machine alone, by the local engine."""
    return emberfed.run(values, output=path).path


def lines(run: Path, event: str) -> list[dict[str, Any]]:
    """Return the lines of a kind of a run's metrics."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["event"] == event]
