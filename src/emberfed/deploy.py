"""What Python users of a deployment call: `serve` on the server, `join` on each client. The commands call the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import final

from emberfed import api, assembly, config, deployment, events, provenance, storage
from emberfed.api import Run
from emberfed.checkpoint import RunFolder, check_free
from emberfed.config import RunConfig
from emberfed.deployment import Home, Roll
from emberfed.engines.flower import Deployment, FlowerEngine
from emberfed.errors import ConfigError
from emberfed.flower import node
from emberfed.flower.certificates import server_files
from emberfed.flower.conversation import Conversation
from emberfed.flower.desk import ClientSettings as ClientSettings
from emberfed.flower.desk import Desk
from emberfed.flower.link import DeploymentConfig, open_link
from emberfed.flower.lobby import enrolled
from emberfed.flower.node import NodeSettings
from emberfed.flower.wire import Hello
from emberfed.models.loading import cpu_threads
from emberfed.records import ClientFailed, Question
from emberfed.sections import override, read_yaml


def configuration(source: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration for a deployment: where it names no engine, or `local`, its engine is `flower`.

    Raises: ConfigError.
    """
    values = override(read_yaml(source or config.quickstart_path()), overrides)
    engine = values.get("engine")
    section = dict(engine) if isinstance(engine, Mapping) else {}
    if section.get("name", "local") == "local":
        values["engine"] = {**section, "name": "flower"}
    return config.parse(values)


def serve(
    checked: RunConfig,
    *,
    output: Path,
    state: Path,
    certificates: Path | None,
    listen: events.Listener = events.ignore,
) -> Run:
    """Wait for clients and run a federation with them, or go on with one.

    Args:
        checked: The configuration; its engine is `flower`.
        output: The run's folder: absent or empty, or that of a run of these settings, which is gone on with.
        state: What the server keeps beside runs: keys of clients, messages under way. Servers with the same one share
            a SuperLink.
        certificates: The server's, as `emberfed certificates` writes them; None: no encryption, and anybody may join.
        listen: Hears of progress.

    Raises:
        EmberfedError: one of its kinds; whatever was finished is on disk, and the same call goes on from it.
    """
    settings = _settings(checked)
    if certificates is not None:
        server_files(certificates)
    path = output.absolute()
    begun = (path / "run.json").is_file()
    if not begun:
        check_free(path)
    with cpu_threads(checked.model.threads):
        home = deployment.home(checked)
        roll = None if not begun else _known(RunFolder.open(path), checked, home)
        link = open_link(settings, state, certificates, partial(_tell, listen))
        with closing(link):
            if roll is None:
                roll = Roll.of(enrolled(home, link, settings, listen), home.test)
            material = deployment.material(home, roll)
            folder = RunFolder.open(path) if begun else assembly.start(checked, path, material)
            tiers = {client.id: client.budget.tier for client in material.clients}
            conversation = Conversation(link, Hello(roll.run, home.expected), tiers, settings)
            engine = FlowerEngine(settings, _Elsewhere(), deployment=Deployment(link, conversation))
            with folder.locked():
                if begun:
                    storage.write(folder.path / "config.yaml", checked.yaml().encode())
                method = assembly.method(checked, listen)
                return api.carry_out(assembly.federation(checked, material, method, engine), folder, listen)


def join(
    checked: RunConfig,
    client: ClientSettings,
    *,
    server: str,
    certificates: Path | None,
    patience_seconds: float = 600.0,
    listen: events.Listener = events.ignore,
) -> None:
    """Take part in a federation until the process is stopped.

    Args:
        checked: The same configuration as the server's; where its own model is may differ.
        client: Who it is, and where its data and its memory are.
        server: `host:port` of the server.
        certificates: This client's, as `emberfed certificates` writes them; None: no encryption.
        patience_seconds: How long a server that cannot be reached is waited for.
        listen: Hears of progress.

    Raises:
        EmberfedError: one of its kinds.
    """
    settings = NodeSettings(server, certificates, client.name, client.state / "node", patience_seconds)
    node.check(settings)
    with cpu_threads(checked.model.threads):
        desk = Desk(checked, client, listen)
        desk.prepare()
        node.serve(settings, desk, partial(_tell_of_node, listen))


@final
class _Elsewhere:
    """The clients, as this process has them."""

    def answer(self, question: Question, /) -> ClientFailed:
        """Say that there are none."""
        return ClientFailed(question.round, question.client, "its data is not on this machine")

    def idle(self, question: Question, /) -> float:
        """Do nothing."""
        return 0.0


def _settings(checked: RunConfig) -> DeploymentConfig:
    if not isinstance(checked.engine, DeploymentConfig):
        raise ConfigError(f"engine.name is {checked.engine_name!r}; a deployment's server runs engine 'flower'")
    return checked.engine


def _known(folder: RunFolder, checked: RunConfig, home: Home) -> Roll:
    """Return who takes part in a run that began. Raises: RunFolderError if it is not this one."""
    provenance.check_same_settings(folder, checked)
    roll = Roll.read(folder)
    provenance.check_same_data(folder, deployment.material(home, roll))
    provenance.check_same_model(folder, home.model)
    return roll


def _tell(listen: events.Listener, message: str) -> None:
    listen(events.Notice("warning", message))


def _tell_of_node(listen: events.Listener, event: node.NodeEvent) -> None:
    """Tell what happens between a client and its server."""
    if isinstance(event, node.Connected):
        listen(events.Notice("info", f"connected to {event.server}"))
    elif isinstance(event, node.Waiting):
        listen(events.Notice("warning", f"waiting for the server: {event.reason}"))
    elif isinstance(event, node.Unrested):
        listen(events.Notice("warning", f"idle work was not finished, and is done when it is needed: {event.reason}"))
