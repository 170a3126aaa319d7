"""Clients on machines of their own, over Flower: its SuperLink beside the server, a SuperNode beside each client."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, final

from emberfed.engine import Clients, Engine, Recipe
from emberfed.errors import ConfigError
from emberfed.records import ClientFailed, Question, Reply

try:
    from emberfed.flower.conversation import Conversation, Link
    from emberfed.flower.link import DeploymentConfig
except ModuleNotFoundError as missing:
    raise ConfigError(f"engine flower needs {missing.name}: pip install 'emberfed[flower]'") from missing


@final
@dataclass(frozen=True, slots=True)
class Deployment:
    """A server's connection to its clients.

    Attributes:
        link: What carries messages; the engine closes it.
        conversation: What the run says over it.
    """

    link: Link
    conversation: Conversation


@final
class FlowerEngine(Engine):
    """Asks clients over a link that is open already: they had to be enrolled by it."""

    Config = DeploymentConfig
    deployed = True

    def __init__(
        self,
        config: Any,
        clients: Clients,
        recipe: Recipe | None = None,
        deployment: Deployment | None = None,
    ) -> None:
        """Take the link and the conversation.

        Args:
            config: The checked section, an instance of `Config`.
            clients: Never asked: clients are elsewhere.
            recipe: Not needed.
            deployment: What a server has opened.

        Raises: ConfigError if there is no deployment, as in a run on one machine.
        """
        super().__init__(config, clients, recipe)
        if deployment is None:
            raise ConfigError("engine flower is a deployment: start it with `emberfed server`")
        self._deployment = deployment

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask; a client works on its idle time by itself, and answers the next question after it.

        Raises: EngineError if the SuperLink is gone for good.
        """
        return self._deployment.conversation.map(questions)

    def close(self) -> None:
        """End the run at the SuperLink."""
        self._deployment.link.close()
