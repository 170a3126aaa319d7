"""Personal evaluation: what each client's own model is worth to it, on data of its own that it does not train on."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from typing import final

from emberfed import admission, events
from emberfed.clients import Client
from emberfed.method import Method
from emberfed.metrics import Metric
from emberfed.records import SCORES, Assessment, Bundle, ClientFailed, Json, Payload, Reply


@final
class Answers:
    """Asks all clients for their scores, and keeps those that can be used."""

    def __init__(self, clients: Sequence[Client], metric: Metric, round: int, listen: events.Listener) -> None:
        """Ask after `round`; `listen` hears of clients that gave nothing."""
        self._clients = {client.id: client for client in clients}
        self._metric = metric
        self._round = round
        self._listen = listen
        self._answered: set[str] = set()
        self._scores: dict[str, dict[str, Json]] = {}
        self._seconds: dict[str, float] = {}

    def jobs(self, method: Method, state: Bundle) -> Iterator[Assessment]:
        """Yield one question for each client: its model is what it would be sent in the next round, and its memory."""
        for client in self._clients.values():
            download = method.dispatch(state, client, self._round + 1)
            yield Assessment(self._round + 1, client.id, download.to_bytes())

    def receive(self, reply: Reply | ClientFailed) -> None:
        """Keep the scores, or tell why there are none; of a client that answers twice neither answer counts."""
        if reply.client in self._answered:
            problem: str | None = "answered twice"
        elif isinstance(reply, ClientFailed):
            problem = reply.reason
        else:
            problem = admission.scores_problem(reply, self._round + 1, self._clients, self._metric)
        self._answered.add(reply.client)
        if problem is not None or isinstance(reply, ClientFailed):
            self._scores.pop(reply.client, None)
            self._listen(
                events.Notice("warning", f"round {self._round}: no personal evaluation of {reply.client}: {problem}")
            )
            return
        self._scores[reply.client] = Payload.from_bytes(reply.upload).content.meta[SCORES]
        self._seconds[reply.client] = reply.measured["seconds"]

    def lines(self) -> list[dict[str, Json]]:
        """Return a line for each client that answered, sorted by id, and one for all of them."""
        if not self._scores:
            return []
        lines = [self._line(self._clients[id_], self._scores[id_]) for id_ in sorted(self._scores)]
        values = [line[self._metric.key] for line in lines]
        losses = [line["loss"] for line in lines if line["loss"] is not None]
        summary = {
            "round": self._round,
            "event": "personal_summary",
            "clients": len(lines),
            "mean": math.fsum(values) / len(values),
            "worst_decile": worst_decile(values, self._metric.sign),
            "spread": statistics.pstdev(values),
            "loss_mean": math.fsum(losses) / len(losses) if losses else None,
            "seconds": math.fsum(self._seconds[id_] for id_ in sorted(self._scores)),
        }
        return [*lines, summary]

    def _line(self, client: Client, scores: dict[str, Json]) -> dict[str, Json]:
        budget = client.budget
        own = {} if budget.adapter_top_k is None else {"adapter_top_k": budget.adapter_top_k}
        place = {"round": self._round, "event": "personal", "client": client.id, "tier": budget.tier}
        return {**place, "top_k": budget.top_k, **own, **scores}


def worst_decile(values: Sequence[float], sign: int) -> float:
    """Return the mean of the worst tenth of the values, rounded up; `sign` is 1 if higher is better, else -1."""
    worst = sorted(values, key=lambda value: sign * value)[: max(1, math.ceil(len(values) / 10))]
    return math.fsum(worst) / len(worst)
