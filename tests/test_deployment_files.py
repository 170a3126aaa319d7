"""The files of docs/deployment: their syntax, and that commands, mounts, keys, names and ports agree.

Nothing is built or started here; see the end of their page.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import click
import pytest
import typer
import yaml
from commands import invoke

from emberfed import config as configuration
from emberfed.cli.app import app
from emberfed.errors import ConfigError, DataError, ModelError, RunFolderError

ROOT = Path(__file__).parents[1]
HERE = ROOT / "docs" / "deployment"
PAGE = (HERE / "README.md").read_text(encoding="utf-8")
CLIENTS = ("c0", "c1", "c2")
SERVICE_KEYS = {
    "image", "user", "environment", "restart", "init", "read_only", "tmpfs", "cap_drop", "security_opt",
    "stop_grace_period", "build", "command", "ports", "volumes", "healthcheck",
}  # fmt: skip
"""What the compose specification calls what we use."""


def parsed(arguments: list[str]) -> Mapping[str, Any]:
    """The parameters that the program reads from a command line; nothing is carried out. Raises: click.UsageError."""
    name, *rest = arguments
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    return group.commands[name].make_context(name, rest).params


def commands(page: str) -> list[str]:
    """The lines of a page's shell examples."""
    return [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]


def documents(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def compose() -> Mapping[str, Any]:
    [whole] = documents(HERE / "compose.yaml")
    return whole


def mounts(service: Mapping[str, Any]) -> dict[str, str]:
    """Source by target."""
    return {target: source for source, target, *_ in (mount.split(":") for mount in service["volumes"])}


def of_kind(documents: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    [found] = [document for document in documents if document["kind"] == kind]
    return found


def below(path: str, folder: str) -> bool:
    return PurePosixPath(folder) in (PurePosixPath(path), *PurePosixPath(path).parents)


def pod(workload: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A workload's pod and its container."""
    spec = workload["spec"]["template"]["spec"]
    [container] = spec["containers"]
    return spec, container


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder after the page's own commands: parts and certificates are there, for both ways to deploy."""
    folder = tmp_path_factory.mktemp("deployment") / "here"
    shutil.copytree(HERE, folder)
    ours = [shlex.split(line)[1:] for line in commands(PAGE) if line.startswith("emberfed ")]
    assert [line[0] for line in ours] == ["data", "certificates", "certificates"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for line in ours[:2]:
            result = invoke(*line)
            assert result.exit_code == 0, result.stderr
        shutil.move("certificates", "of-compose")
        assert invoke(*ours[2]).exit_code == 0
        shutil.move("certificates", "of-kubernetes")
    return folder


def test_the_configuration_is_one() -> None:
    checked = configuration.load(HERE / "federation.yaml")
    assert checked.clients.count == len(CLIENTS)
    assert {"server", *CLIENTS} == compose()["services"].keys()


def test_compose_says_nothing_that_it_does_not_know() -> None:
    whole = compose()
    assert whole.keys() == {"name", "x-common", "services"}
    for service in whole["services"].values():
        assert service.keys() <= SERVICE_KEYS
        assert {"image", "command", "volumes", "user", "cap_drop"} <= service.keys()
    assert [name for name, service in whole["services"].items() if "build" in service] == ["server"]
    build = whole["services"]["server"]["build"]
    assert (HERE / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()


def test_compose_s_server_listens_where_clients_dial() -> None:
    services = compose()["services"]
    server = parsed(services["server"]["command"])
    assert server["host"] == "0.0.0.0"
    assert services["server"]["ports"] == [f"{server['port']}:{server['port']}"]
    assert f"('127.0.0.1', {server['port']})" in services["server"]["healthcheck"]["test"][-1]
    for name in CLIENTS:
        assert parsed(services[name]["command"])["server"] == f"server:{server['port']}"


@pytest.mark.parametrize("name", ["server", *CLIENTS])
def test_compose_mounts_what_commands_name(made: Path, name: str) -> None:
    """Also, a client's name is that of the folder its certificates are mounted at, and its key is of that name."""
    service = compose()["services"][name]
    given, held = parsed(service["command"]), mounts(service)
    own = {"server": made / "of-compose" / "server", **{client: made / "of-compose" / client for client in CLIENTS}}
    assert held[str(given["config"])] == "./federation.yaml"
    assert held[str(given["certificates"])] == f"./certificates/{name}"
    assert Path(given["certificates"]).name == name
    assert own[name].is_dir()
    assert held["/work"] == f"./work/{name}"
    assert below(str(given["state"]), "/work")
    assert not given["overrides"]
    assert given["insecure"] is False
    if name == "server":
        assert below(str(given["folder"]), "/work")
        assert sorted(path.stem for path in (own[name] / "clients").iterdir()) == list(CLIENTS)
    else:
        assert held[str(given["data"])] == f"./parts/{name}"
        assert (made / "parts" / name / "data.parquet").is_file()
    writable = [mount for mount in service["volumes"] if not mount.endswith(":ro")]
    assert writable == [f"./work/{name}:/work"]
    assert f"work/{name}" in next(line for line in commands(PAGE) if line.startswith("mkdir"))


def test_clients_are_on_the_tiers_that_data_split_shows(made: Path) -> None:
    result = invoke("data", "split", made / "federation.yaml", "--output", made / "again", "--json")
    tiers = dict(re.findall(r'"client": "(\w+)",\s+"tier": "(\w+)"', result.stdout))
    services = compose()["services"]
    assert {name: parsed(services[name]["command"])["tier"] for name in CLIENTS} == tiers
    _, container = pod(of_kind(documents(HERE / "kubernetes" / "client.yaml"), "Deployment"))
    assert parsed(container["args"])["tier"] == tiers["c0"]


@pytest.mark.parametrize("name", ["server.yaml", "client.yaml"])
def test_manifests_fit_kubernetes_schemas(name: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    for document in documents(HERE / "kubernetes" / name):
        validate.validate(document, "1.34", strict=True)
        spoilt = {**document, "spec": {**document["spec"], "replica": 1}}
        with pytest.raises(validate.ValidationError):
            validate.validate(spoilt, "1.34", strict=True)


@pytest.mark.parametrize(("name", "kind"), [("server", "Job"), ("client", "Deployment")])
def test_manifests_hold_together(name: str, kind: str) -> None:
    found = documents(HERE / "kubernetes" / f"{name}.yaml")
    workload = of_kind(found, kind)
    labels = workload["spec"]["template"]["metadata"]["labels"]
    spec, container = pod(workload)
    held = {mount["name"]: mount for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert held.keys() == volumes.keys()
    given = parsed(container["args"])
    assert below(str(given["config"]), held["configuration"]["mountPath"])
    assert Path(given["config"]).name == "federation.yaml"
    assert str(given["certificates"]) == held["certificates"]["mountPath"]
    assert below(str(given["state"]), held["work"]["mountPath"])
    assert given["insecure"] is False
    claim = volumes["work"]["persistentVolumeClaim"]["claimName"]
    assert of_kind(found, "PersistentVolumeClaim")["metadata"]["name"] == claim
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert [mount for mount in held if not held[mount].get("readOnly")] == ["work", "temporary"]
    if name == "server":
        service = of_kind(found, "Service")
        assert service["spec"]["selector"].items() <= labels.items()
        [port] = service["spec"]["ports"]
        [opened] = container["ports"]
        assert (port["targetPort"], port["port"]) == (opened["name"], given["port"])
        assert opened["containerPort"] == given["port"]
        assert given["host"] == "0.0.0.0"
        assert below(str(given["folder"]), held["work"]["mountPath"])
        assert spec["restartPolicy"] == "Never", "a rule on exit codes needs it"
    else:
        assert workload["spec"]["selector"]["matchLabels"].items() <= labels.items()
        assert str(given["data"]) == held["data"]["mountPath"]
        assert volumes["data"]["persistentVolumeClaim"]["readOnly"] is True
        assert Path(given["certificates"]).name == labels["app.kubernetes.io/instance"] == "c0"
        [dialled] = documents(HERE / "kubernetes" / "server.yaml")[:1]
        assert given["server"] == f"{dialled['metadata']['name']}:{dialled['spec']['ports'][0]['port']}"


def test_a_job_gives_up_where_the_same_again_would_fail_again() -> None:
    job = of_kind(documents(HERE / "kubernetes" / "server.yaml"), "Job")
    rule = job["spec"]["podFailurePolicy"]["rules"][0]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"]["containerName"] == pod(job)[1]["name"]
    hopeless = (ConfigError, DataError, ModelError, RunFolderError)
    assert rule["onExitCodes"]["values"] == [kind.exit_code for kind in hopeless]


def test_kubectl_is_given_files_that_are_there(made: Path, tmp_path: Path) -> None:
    """And what it makes of them has the names and keys that the manifests mount."""
    objects: dict[str, set[str]] = {}
    for line in (shlex.split(line) for line in commands(PAGE)):
        if line[:2] == ["kubectl", "create"]:
            name = line[4 if line[2] == "secret" else 3]
            for option in line:
                if option.startswith("--from-file="):
                    key, _, given = option.removeprefix("--from-file=").rpartition("=")
                    source = made / given.replace("certificates/", "of-kubernetes/")
                    assert source.exists(), source
                    keys = {file.name for file in source.iterdir()} if source.is_dir() else {key or source.name}
                    objects[name] = objects.get(name, set()) | keys
    server, _ = pod(of_kind(documents(HERE / "kubernetes" / "server.yaml"), "Job"))
    client, _ = pod(of_kind(documents(HERE / "kubernetes" / "client.yaml"), "Deployment"))
    by_name = {volume["name"]: volume for volume in server["volumes"]}
    assert objects[by_name["configuration"]["configMap"]["name"]] == {"federation.yaml"}
    secret, known = by_name["certificates"]["projected"]["sources"]
    items = known["configMap"]["items"]
    assert {item["key"] for item in items} == objects[known["configMap"]["name"]] == {f"{c}.pub" for c in CLIENTS}
    from emberfed.flower.certificates import client_files, server_files

    mounted = tmp_path / "server"
    (mounted / "clients").mkdir(parents=True)
    for key in objects[secret["secret"]["name"]]:
        shutil.copy(made / "of-kubernetes" / "server" / key, mounted / key)
    for item in items:
        shutil.copy(made / "of-kubernetes" / "server" / "clients" / item["key"], mounted / item["path"])
    assert sorted(server_files(mounted).clients) == list(CLIENTS)
    assert "emberfed-server" in server_files(mounted).names
    own = next(volume["secret"]["secretName"] for volume in client["volumes"] if "secret" in volume)
    (tmp_path / "c0").mkdir()
    for key in objects[own]:
        shutil.copy(made / "of-kubernetes" / "c0" / key, tmp_path / "c0" / key)
    assert client_files(tmp_path / "c0").key == tmp_path / "c0" / "client.key"


def test_another_client_is_the_same_file_with_other_words() -> None:
    """The sed command at the top of the manifest, done here: nothing of c0 stays."""
    text = (HERE / "kubernetes" / "client.yaml").read_text(encoding="utf-8")
    pairs = re.findall(r"-e 's/(\w+)/(\w+)/g?'", text)
    assert pairs == [("c0", "c1"), ("laptop", "phone")]
    for old, new in pairs:
        text = text.replace(old, new)
    assert "c0" not in json.dumps(list(yaml.safe_load_all(text)))
    _, container = pod(of_kind(list(yaml.safe_load_all(text)), "Deployment"))
    given = parsed(container["args"])
    assert (Path(given["certificates"]).name, given["tier"]) == ("c1", "phone")


def test_the_image_is_made_of_files_that_are_there() -> None:
    """Every instruction is one of Docker's; what is copied exists and is not ignored; the extra exists."""
    text = (HERE / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "ENTRYPOINT"}
    assert {instruction for instruction, _ in lines} == known
    ignored = (HERE / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    for instruction, rest in lines:
        if instruction == "COPY" and not rest.startswith("--from=build"):
            for source in rest.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert f"!{source.removeprefix('./')}" in ignored, source
    [extra] = re.findall(r"'\.\[(\w+)\]'", text)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert extra in project["optional-dependencies"]
    assert 'ENTRYPOINT ["emberfed"]' in text
    assert "emberfed" in project["scripts"]
    [user] = re.findall(r"^USER (\d+:\d+)$", text, re.MULTILINE)
    for name, kind in (("server", "Job"), ("client", "Deployment")):
        context = pod(of_kind(documents(HERE / "kubernetes" / f"{name}.yaml"), kind))[0]["securityContext"]
        assert user == f"{context['runAsUser']}:{context['runAsGroup']}"


def test_links_of_the_page_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (HERE / link).exists(), link
