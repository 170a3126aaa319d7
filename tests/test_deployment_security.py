"""What docs/deployment/security.md promises and can be tried out cheaply; and that both pages' commands are ones."""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from deployments import grounds
from test_deployment import of_three
from test_deployment_files import commands, parsed

from emberfed.config import parse
from emberfed.flower import certificates
from emberfed.sections import parse_yaml

HERE = Path(__file__).parents[1] / "docs" / "deployment"
PAGES = ("three-machines.md", "security.md", "README.md")


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_the_pages_are_ones(name: str) -> None:
    """In shell examples, units and inline; and links lead somewhere."""
    page = (HERE / name).read_text(encoding="utf-8")
    units = [line.partition("=/srv/emberfed/venv/bin/")[2] for line in page.splitlines() if "ExecStart=" in line]
    lines = [line for line in [*commands(page), *units] if line.startswith("emberfed ")]
    for line in lines:
        parsed(shlex.split(line)[1:])
    assert len(lines) >= (8 if name == "three-machines.md" else 0)
    for link in re.findall(r"\]\(([^)#]+)", page):
        assert (HERE / link).exists(), link


def test_the_page_s_configuration_is_one() -> None:
    page = (HERE / "three-machines.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    checked = parse(parse_yaml(block, "three-machines.md"))
    assert checked.clients.count == 2
    assert [tier.name for tier in checked.clients.tiers] == re.findall(r"--tier (\w+) --certificates \w+\n", page)[:2]


def test_tests_that_the_page_names_exist() -> None:
    page = (HERE / "security.md").read_text(encoding="utf-8")
    found = "".join(file.read_text(encoding="utf-8") for file in Path(__file__).parent.glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(named) >= 5
    assert not [name for name in named if f"def {name}(" not in found]


def test_keys_are_their_owners_alone(tmp_path: Path) -> None:
    """Whatever the umask says."""
    before = os.umask(0)
    try:
        certificates.make(tmp_path / "made", ["localhost"], ["anna", "ben"], 30)
        certificates.own_key(tmp_path / "made" / "insecure.key")
    finally:
        os.umask(before)
    keys = sorted(tmp_path.rglob("*.key"))
    assert [key.name for key in keys] == ["client.key", "client.key", "ca.key", "insecure.key", "server.key"]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


_LOADED = """
import json, os, sys
import emberfed.deploy, emberfed.engines.flower, emberfed.flower.supernode
import flwr.supercore.telemetry
print(json.dumps([flwr.supercore.telemetry.FLWR_TELEMETRY_ENABLED, os.environ["FLWR_TELEMETRY_ENABLED"], *sys.modules]))
"""


@pytest.fixture(scope="module")
def loaded() -> tuple[list[str], set[str]]:
    """Whether telemetry is on, and all modules, of a process that has loaded both sides; asked to have it on."""
    environment = {**os.environ, "FLWR_TELEMETRY_ENABLED": "1", "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, "-c", _LOADED], env=environment, capture_output=True, text=True, check=True)
    here, inherited, *modules = json.loads(told.stdout)
    return [here, inherited], set(modules)


def test_flower_s_telemetry_is_off(loaded: tuple[list[str], set[str]]) -> None:
    """In a server's or client's own process, and in what it starts."""
    assert loaded[0] == ["0", "0"]


def test_a_client_has_nothing_that_runs_a_server_s_code(loaded: tuple[list[str], set[str]]) -> None:
    """What of Flower fetches, installs and imports apps is not even loaded, and no request for one is in our code."""
    assert "flwr.supernode.nodestate" in loaded[1]
    running = (
        "flwr.supernode.runtime.run_clientapp",
        "flwr.cli.install",
        "flwr.common.object_ref",
        "flwr.clientapp.utils",
    )
    assert not loaded[1] & set(running)
    for name in ("node", "supernode", "desk", "wire", "arriving"):
        file = Path(certificates.__file__).with_name(f"{name}.py")
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"GetFab|PullFab|pickle|importlib|\beval\(|\bexec\(|torch\.load", text), name


@pytest.mark.slow
def test_only_the_servers_port_is_open_to_others(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """While a run is under way, all that any of its processes listens on, but that port, is the loopback's."""
    values = of_three(tiny_model_folder, tiny_data, training={"rounds": 500, "max_steps": 1})
    with grounds(tmp_path / "deployment", values) as place:
        place.server("--host", "0.0.0.0")
        place.clients()
        place.wait_for("server", "round 1 of 500: done")
        ours = {process.pid for process in place.processes}
        ours |= {child.pid for pid in ours for child in psutil.Process(pid).children(recursive=True)}
        state = place.path / "server-state" / "superlink"
        ours.add(json.loads((state / "superlink.json").read_text())["process"])
        listening = [
            one.laddr
            for pid in ours
            for one in psutil.Process(pid).net_connections(kind="inet")
            if one.status == psutil.CONN_LISTEN
        ]
        public = [address for address in listening if address.ip not in ("127.0.0.1", "::1")]
        assert [(address.ip, address.port) for address in public] == [("0.0.0.0", place.port)]
        assert len(listening) == 1 + 1 + len(place.tiers), "the SuperLink's loopback, and each SuperNode's"
        assert stat.S_IMODE(state.stat().st_mode) == 0o700
        assert stat.S_IMODE((state / "secret").stat().st_mode) == 0o600
