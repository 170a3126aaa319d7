"""What a round asks before training: surveys of clients' data, for methods that want them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import final

from emberfed import admission
from emberfed.clients import Client
from emberfed.records import Bundle, ClientFailed, Payload, Reply, Survey, TensorSpec


@final
class Surveys:
    """Asks some clients of a round for their surveys, and keeps those that can be used.

    Attributes:
        failed: Why a client gave none, by its id; it cannot take part in the round.
    """

    def __init__(self, clients: Sequence[Client], specs: Mapping[str, TensorSpec], round: int) -> None:
        """Ask before `round`."""
        self.failed: dict[str, str] = {}
        self._clients = sorted(client.id for client in clients)
        self._specs = specs
        self._round = round
        self._received: dict[str, Payload] = {}

    def questions(self) -> Iterator[Survey]:
        """Yield one question for each client."""
        for id_ in self._clients:
            yield Survey(self._round, id_, Payload(self._round, id_, Bundle()).to_bytes())

    def receive(self, reply: Reply | ClientFailed) -> None:
        """Keep the survey, or note why there is none; of a client that answers twice neither answer counts."""
        if reply.client not in self._clients:
            return
        if reply.client in self._received or reply.client in self.failed:
            self._received.pop(reply.client, None)
            self.failed[reply.client] = "survey: answered twice"
            return
        if isinstance(reply, ClientFailed):
            self.failed[reply.client] = f"survey: {reply.reason}"
            return
        problem = admission.survey_problem(reply, self._round, self._specs)
        if problem is not None:
            self.failed[reply.client] = f"survey: {problem}"
            return
        self._received[reply.client] = Payload.from_bytes(reply.upload)

    def payloads(self) -> list[Payload]:
        """Return what came in, sorted by client id."""
        return [self._received[id_] for id_ in sorted(self._received)]
