"""What Flower's way costs a payload: bytes on the wire, seconds, and memory of each process that it passes through.

A server asks one client by the link of a deployment, without encryption, and the client's desk gives the payload back:
so it crosses twice. There is no model. Bytes are counted by a relay between client and server; `*_bytes` are a
process's largest resident size while the payload was under way (VmHWM, reset before), above what it was just before.

Writes `benchmarks/results/flower_wire.json`.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, final

import psutil

RESULT = Path(__file__).parent / "results" / "flower_wire.json"
SIZES = (1_000_000, 20_000_000, 200_000_000, 2**30)
PROCESSES = ("server", "superlink", "supernode", "client")


def main() -> None:
    """Measure, print and save."""
    rows = [measure(size) for size in SIZES]
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(rows, indent=1) + "\n")
    print("MB and times the payload at most, above what each process had before")
    print("".join(f"{column:>14}" for column in ("payload MB", "on the wire", "overhead", "seconds", *PROCESSES)))
    for row in rows:
        size = row["payload_bytes"]
        grown = [row[f"{name}_bytes"] for name in PROCESSES]
        print(
            f"{size / 1e6:>14.1f}{row['wire_bytes'] / 1e6:>14.1f}{row['overhead']:>14.2%}{row['seconds']:>14.1f}"
            + "".join(f"{f'{one / 1e6:.0f} ({one / size:.1f}x)':>14}" for one in grown)
        )


def measure(size: int) -> dict[str, Any]:
    """Send a payload to a client and back, and return the row."""
    port = _free_port()
    with (
        tempfile.TemporaryDirectory() as folder,
        _Relay(port) as relay,
        _child("serve", str(port), folder, str(size)) as server,
        _child("answer", f"127.0.0.1:{relay.port}", folder) as client,
    ):
        told = _line(server)
        processes = {
            "server": psutil.Process(server.pid),
            "superlink": psutil.Process(told["superlink"]),
            "supernode": psutil.Process(client.pid).children()[0],
            "client": psutil.Process(client.pid),
        }
        before = {name: _reset(process) for name, process in processes.items()}
        relay.bytes = 0
        _go_on(server)
        seconds = _line(server)["seconds"]
        wire = relay.bytes
        grown = {f"{name}_bytes": _peak(process) - before[name] for name, process in processes.items()}
        _go_on(server)
        server.wait(60)
    return {
        "payload_bytes": size,
        "wire_bytes": wire,
        "overhead": wire / (2 * size) - 1,
        "seconds": seconds,
        **grown,
    }


def serve(port: int, folder: Path, size: int) -> None:
    """Be the server: ask once for little, then, when told so, for much."""
    from emberfed.events import ignore
    from emberfed.flower.link import DeploymentConfig, open_link
    from emberfed.flower.server_state import ServerState

    settings = DeploymentConfig(host="127.0.0.1", port=port, poll_seconds=0.05, grace_seconds=0.0)
    link = open_link(settings, folder / "server", None, ignore)
    try:
        while "echo" not in link.nodes():
            time.sleep(0.05)
        _exchanged(link, 1000)
        running = ServerState(folder / "server" / "superlink").running()
        assert running is not None
        print(json.dumps({"superlink": running.process}), flush=True)
        sys.stdin.readline()
        print(json.dumps({"seconds": _exchanged(link, size)}), flush=True)
        sys.stdin.readline()
    finally:
        link.close()


def _exchanged(link: Any, size: int) -> float:
    """Send so many bytes and wait until they are back; return the seconds."""
    from flwr.app import RecordDict

    from emberfed.flower.wire import Asked, Hello, asked, read_answered
    from emberfed.records import Job, Reply

    payload = os.urandom(size)
    digest = hashlib.sha256(payload).digest()
    started = time.perf_counter()
    message = link.push(link.nodes()["echo"], asked(Asked(Hello("0", {}), "all", Job(1, "echo", payload))), 3600.0)
    del payload
    while (answer := link.pull(message)) is None:
        time.sleep(0.05)
    assert isinstance(answer, RecordDict), answer
    reply = read_answered(answer)
    seconds = time.perf_counter() - started
    assert isinstance(reply, Reply)
    assert hashlib.sha256(reply.upload).digest() == digest
    return seconds


def answer(server: str, folder: Path) -> None:
    """Be the client."""
    from emberfed.flower.node import NodeSettings
    from emberfed.flower.node import serve as serve_node

    serve_node(NodeSettings(server, None, "echo", folder / "client", 120.0), _Echo(), lambda _: None)


@final
class _Echo:
    """A desk that gives back what it is sent."""

    def answer(self, content: Any) -> Any:
        from emberfed.flower.wire import Asked, answered, read_asked
        from emberfed.records import Reply

        heard = read_asked(content)
        assert isinstance(heard, Asked)
        return answered(Reply(heard.question.round, heard.question.client, heard.question.download, {"seconds": 0.0}))

    def rest(self) -> None:
        """Nothing."""


@final
class _Relay:
    """Passes connections on to a port of this machine and counts what passes."""

    def __init__(self, to: int) -> None:
        self.bytes = 0
        self._to = to
        self._counting = threading.Lock()
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]

    def __enter__(self) -> _Relay:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except OSError:
                    near.close()
                    continue
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=(source, target), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 18):
                with self._counting:
                    self.bytes += len(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def _child(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "benchmarks.flower_wire", *arguments]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.terminate()
        child.wait(60)


def _line(child: subprocess.Popen[str]) -> Any:
    out: IO[str] | None = child.stdout
    assert out is not None
    return json.loads(out.readline())


def _go_on(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("\n")
    child.stdin.flush()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _reset(process: psutil.Process) -> int:
    """Let a process's largest resident size begin anew; return its present one."""
    Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    return _peak(process)


def _peak(process: psutil.Process) -> int:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) * 1024


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            main()
        case ["serve", port, folder, size]:
            serve(int(port), Path(folder), int(size))
        case ["answer", server, folder]:
            answer(server, Path(folder))
