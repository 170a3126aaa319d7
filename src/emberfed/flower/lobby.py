"""Before a deployment's first round: clients come, and describe themselves."""

from __future__ import annotations

import time
from typing import final

from flwr.app import RecordDict

from emberfed import deployment, events
from emberfed.deployment import Enrolled, Home
from emberfed.errors import EngineError, RunFolderError
from emberfed.flower.conversation import Link, Lost
from emberfed.flower.link import DeploymentConfig
from emberfed.flower.wire import Description, Hello, as_line, asked, read_answered

_PAUSE_SECONDS = 0.2
_NO_RUN = "0"
"""The run's identity in questions before there is one."""
_ASKED_FOR_SECONDS = 3600.0
_ASKED_AGAIN_SECONDS = 15.0
"""Pause before a client that could not take part is asked whether it can now."""


def enrolled(home: Home, link: Link, settings: DeploymentConfig, listen: events.Listener) -> list[Enrolled]:
    """Wait until as many clients as the configuration counts have described themselves.

    Raises: EngineError if too few come in time; it says who came and why others were turned away.
    """
    wanted = home.config.clients.count
    lobby = _Lobby(home, listen)
    until = time.monotonic() + settings.join_seconds
    listen(events.Notice("info", f"waiting for {wanted} clients at port {settings.port}"))
    while len(lobby.enrolled) < wanted:
        lobby.look(link)
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
    """Clients that came, before the run begins. Nobody waits for anybody: one may take long to load its model."""

    def __init__(self, home: Home, listen: events.Listener) -> None:
        self.enrolled: dict[str, Enrolled] = {}
        self.refused: dict[str, str] = {}
        self._home = home
        self._listen = listen
        self._asked: dict[str, tuple[int, str]] = {}
        self._again_at: dict[str, float] = {}

    def look(self, link: Link) -> None:
        """Ask clients that are there and have not said who they are; hear those that have."""
        nodes, now = link.nodes(), time.monotonic()
        for name, (node_id, message) in list(self._asked.items()):
            answer = link.pull(message)
            if answer is not None or nodes.get(name) != node_id:
                del self._asked[name]
            if isinstance(answer, RecordDict) or (isinstance(answer, Lost) and not answer.away):
                self._again_at[name] = now + _ASKED_AGAIN_SECONDS
                self._hear(name, self._read(name, answer))
        for name in sorted(nodes.keys() - self.enrolled.keys() - self._asked.keys()):
            if self._again_at.get(name, now) <= now:
                content = asked(Hello(_NO_RUN, self._home.expected))
                self._asked[name] = nodes[name], link.push(nodes[name], content, _ASKED_FOR_SECONDS)

    def _read(self, name: str, answer: RecordDict | Lost) -> Enrolled | str:
        if isinstance(answer, Lost):
            return as_line(answer.reason)
        try:
            described = read_answered(answer)
        except RunFolderError as error:
            return as_line(str(error))
        if not isinstance(described, Description):
            return "it answered a question that it was not asked"
        found = deployment.read_description(described.told, name, self._home)
        return found if isinstance(found, Enrolled) else as_line(found)

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
