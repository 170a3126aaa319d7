"""What Python users of a deployment call: `serve` on the server, `join` on each client. The commands call the same."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, final

from emberfed import api, assembly, config, deployment, events, provenance, storage
from emberfed.api import Run
from emberfed.checkpoint import RunFolder, check_free
from emberfed.config import RunConfig
from emberfed.deployment import Enrolled, Home, Roll
from emberfed.engines.flower import Deployment, FlowerEngine
from emberfed.errors import ConfigError, EngineError, RunFolderError
from emberfed.flower import node
from emberfed.flower.certificates import server_files
from emberfed.flower.conversation import Ask, Conversation, Link, exchange
from emberfed.flower.desk import ClientSettings as ClientSettings
from emberfed.flower.desk import Desk
from emberfed.flower.link import DeploymentConfig, open_link
from emberfed.flower.node import NodeSettings
from emberfed.flower.wire import Description, Hello, as_line, asked, read_answered
from emberfed.models.loading import cpu_threads
from emberfed.records import ClientFailed, Question
from emberfed.sections import override, read_yaml

_PAUSE_SECONDS = 0.2
_ASKED_AGAIN_SECONDS = 15.0
"""Pause before a client that could not take part is asked whether it can now."""


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
                roll = Roll.of(_enrolled(home, link, settings, listen), home.test)
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


def _enrolled(home: Home, link: Link, settings: DeploymentConfig, listen: events.Listener) -> list[Enrolled]:
    """Wait until as many clients as the configuration counts have described themselves.

    Raises: EngineError if too few come in time; it says who came and why others were turned away.
    """
    wanted = home.config.clients.count
    lobby = _Lobby(home, listen)
    until = time.monotonic() + settings.join_seconds
    listen(events.Notice("info", f"waiting for {wanted} clients at port {settings.port}"))
    while len(lobby.enrolled) < wanted:
        lobby.ask(link, settings)
        if len(lobby.enrolled) < wanted and time.monotonic() >= until:
            turned_away = "".join(f"; {name} cannot take part: {why}" for name, why in sorted(lobby.refused.items()))
            came = ", ".join(sorted(lobby.enrolled)) or "none"
            raise EngineError(
                f"{len(lobby.enrolled)} of {wanted} clients joined within {settings.join_seconds:g} s "
                f"(engine.join_seconds): {came}{turned_away}; start the others and repeat the command, or set "
                f"clients.count"
            )
        time.sleep(_PAUSE_SECONDS)
    return [lobby.enrolled[name] for name in sorted(lobby.enrolled)[:wanted]]


@final
class _Lobby:
    """Clients that came, before the run begins."""

    def __init__(self, home: Home, listen: events.Listener) -> None:
        self.enrolled: dict[str, Enrolled] = {}
        self.refused: dict[str, str] = {}
        self._home = home
        self._listen = listen
        self._asked_at: dict[str, float] = {}

    def ask(self, link: Link, settings: DeploymentConfig) -> None:
        """Ask clients that are there and have not said who they are."""
        now = time.monotonic()
        fresh = [
            name
            for name in sorted(link.nodes())
            if name not in self.enrolled
            and now - self._asked_at.get(name, -_ASKED_AGAIN_SECONDS) >= _ASKED_AGAIN_SECONDS
        ]
        content = partial(asked, Hello("0", self._home.expected))
        asks = (Ask(name, name, content) for name in fresh)
        patient = settings.model_copy(update={"in_flight": max(len(fresh), 1), "round_deadline_seconds": None})
        for name, answer in exchange(link, asks, patient):
            self._asked_at[name] = time.monotonic()
            self._hear(name, self._read(name, answer))

    def _read(self, name: str, answer: Any) -> Enrolled | str:
        try:
            found = answer if isinstance(answer, str) else read_answered(answer)
        except RunFolderError as error:
            return str(error)
        if isinstance(found, Description):
            client = deployment.read_description(found.told, name, self._home)
            return as_line(client) if isinstance(client, str) else client
        return found if isinstance(found, str) else "it answered a question that it was not asked"

    def _hear(self, name: str, found: Enrolled | str) -> None:
        if isinstance(found, Enrolled):
            self.enrolled[name] = found
            self.refused.pop(name, None)
            have, wanted = len(self.enrolled), self._home.config.clients.count
            told = f"client {name} joined (tier {found.tier}, {found.counts['examples']} examples): {have} of {wanted}"
            self._listen(events.Notice("info", told))
        elif self.refused.get(name) != found:
            self.refused[name] = found
            self._listen(events.Notice("warning", f"client {name} cannot take part: {found}"))


def _tell(listen: events.Listener, message: str) -> None:
    listen(events.Notice("warning", message))


def _tell_of_node(listen: events.Listener, event: node.NodeEvent) -> None:
    """Tell what happens between a client and its server."""
    if isinstance(event, node.Connected):
        listen(events.Notice("info", f"connected to {event.server}"))
    elif isinstance(event, node.Waiting):
        listen(events.Notice("warning", f"waiting for the server: {event.reason}"))
