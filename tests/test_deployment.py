"""A server and three clients as processes of their own, with certificates: the bits of a run on one machine."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import invoke
from deployments import Grounds, grounds, here, lines
from federations import Vision, bits, config
from test_contract import refusal

import emberfed
from emberfed.engine import engine_names, load_engine
from emberfed.method import method_names

CI_METHODS = ("a3smoe", "hetlora")
"""One of routed experts, one of ranks; `make test-slow` deploys all."""


def of_three(model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """A federation of three clients on two tiers."""
    plain = {"training": {"rounds": 3, "max_steps": 2}, "evaluation": {"every": 0, "max_examples": 2}}
    values = config(model, data, **{**plain, **sections})
    tiers = [{**tier, "share": share} for tier, share in zip(values["clients"]["tiers"][:2], (0.67, 0.33), strict=True)]
    values["clients"] = {**values["clients"], "count": 3, "tiers": tiers}
    values["model"]["threads"] = 1
    return values


def deployed(place: Grounds) -> Path:
    """Start everything and wait for the server's end."""
    server = place.server("--set", "engine.poll_seconds=0.1")
    place.clients()
    assert place.ended(server) == 0, "\n".join(place.everything())
    return place.run


@pytest.mark.parametrize(
    "method", [name if name in CI_METHODS else pytest.param(name, marks=pytest.mark.slow) for name in method_names()]
)
def test_a_deployment_has_the_bits_of_a_run_on_one_machine(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    if refusal("olmoe", method) is None:
        model, data, task = tiny_model_folder, tiny_data, "generation"
    else:
        vision = Vision.made(tmp_path)
        model, data, task = vision.model, vision.data, "image_classification"
    sections: dict[str, Any] = {"method": {"name": method}, "data": {"task": task, "client_test_share": 0.3}}
    values = of_three(model, data, **sections)
    local = here(values, tmp_path / "local")
    with grounds(tmp_path / "deployment", values) as place:
        run = deployed(place)
        assert bits(run) == bits(local)
        assert len(bits(run)) > 3
        for event in ("evaluation", "personal"):
            timeless = [{**line, "seconds": 0, "peak_memory_bytes": 0} for line in lines(run, event)]
            assert timeless == [{**line, "seconds": 0, "peak_memory_bytes": 0} for line in lines(local, event)]
            assert timeless
        for name in place.tiers:
            assert "round 3: done" in place.log(name)
        assert not (run / "memory").exists(), "clients' memories stay with them"
        check_what_is_kept(place)


def check_what_is_kept(place: Grounds) -> None:
    """A deployment's report and evaluation need no client; its goes on by the server alone."""
    run = place.run
    kept = json.loads((run / "partition.json").read_text())
    assert kept["kind"] == "deployment"
    assert {id_: told["tier"] for id_, told in kept["clients"].items()} == dict(place.tiers)
    assert kept["rows"] == {}
    assert "<html" in (run / "report.html").read_text()
    assert f"emberfed evaluate {run}" in place.log("server")
    assert "emberfed resume" not in place.log("server")
    evaluated = invoke("evaluate", run, "--json")
    assert evaluated.exit_code == 0, evaluated.stderr
    assert [line["loss"] for line in json.loads(evaluated.stdout)["evaluations"]] == [
        line["loss"] for line in lines(run, "evaluation") if line["round"] == 3
    ]
    refused = invoke("resume", run)
    assert refused.exit_code == 2
    assert "emberfed server CONFIG --output RUN" in refused.stderr


def test_no_record_of_a_client_crosses_the_wire(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """All bytes in both directions, without encryption, hold payloads, and no text of any client's record."""
    values = of_three(tiny_model_folder, tiny_data, training={"rounds": 1, "max_steps": 1})
    with grounds(tmp_path / "deployment", values) as place, recorded(place.port) as (port, heard):
        bare = ["--state", str(place.path / "server-state"), "--port", str(place.port), "--insecure"]
        server = place.start("server", "server", str(place.config), "--output", str(place.run), *bare)
        for name, tier in place.tiers.items():
            own = ["--data", str(place.path / "parts" / name), "--tier", tier, "--name", name, "--insecure"]
            own += ["--server", f"localhost:{port}", "--state", str(place.path / f"state-{name}")]
            place.start(name, "client", str(place.config), *own)
        assert place.ended(server) == 0, "\n".join(place.everything())
        place.stop()
        told = b"".join(heard)
        assert b"lora_A" in told, "payloads were recorded"
        uploads = sum(file.stat().st_size for file in (place.run / "rounds/0001/clients").iterdir())
        assert len(told) > 2 * uploads, "downloads and uploads"
        task, section = emberfed.config.parse(values).task, emberfed.config.parse(values).data
        texts = set()
        for name in place.tiers:
            for record in task.own_records(section, place.path / "parts" / name, ()):
                texts |= {str(record[key]) for key in ("instruction", "context", "response") if len(record[key]) >= 12}
        assert len(texts) > 10
        assert not [text for text in texts if text.encode() in told]


@contextmanager
def recorded(to: int) -> Iterator[tuple[int, list[bytes]]]:
    """Pass connections on to a port of this machine; give the port to connect to, and all bytes that pass."""
    heard: list[bytes] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                heard.append(data)
                target.sendall(data)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    class Between(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", to), timeout=60) as far:
                back = threading.Thread(target=pump, args=(far, self.request))
                back.start()
                pump(self.request, far)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Between) as between:
        threading.Thread(target=between.serve_forever).start()
        yield between.server_address[1], heard
        between.shutdown()


def test_deployments_are_engines_that_a_run_on_one_machine_refuses(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    found = [name for name in engine_names() if load_engine(name).deployed]
    assert found == ["flower"]
    with pytest.raises(emberfed.EmberfedError, match="emberfed server CONFIG --output RUN"):
        emberfed.run(config(tiny_model_folder, tiny_data, engine={"name": "flower"}), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()
