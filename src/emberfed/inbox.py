"""One round's conversation with its clients: jobs out, replies in, each admitted upload on disk at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import final

from emberfed import admission, clock, events
from emberfed.admission import Asked
from emberfed.checkpoint import PartialRound
from emberfed.clients import Client
from emberfed.clock import ClientTime, ClockConfig
from emberfed.errors import RoundFailed
from emberfed.method import Method
from emberfed.records import ACTIVATION_COUNTS, Bundle, ClientFailed, Job, Json, Payload, Reply


@final
class Inbox:
    """Collects a round's uploads; remembers who failed and who was refused, by name."""

    def __init__(
        self,
        round: int,
        cohort: Sequence[Client],
        partial: PartialRound,
        listen: events.Listener,
        timing: ClockConfig | None = None,
    ) -> None:
        """Open the round's inbox; uploads kept before an interruption count as received.

        Args:
            round: The round.
            cohort: Who is asked.
            partial: Where admitted uploads go.
            listen: Who hears of replies.
            timing: The clock's settings, for clients that all have a device; None: there is no clock.
        """
        self.failed: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._round = round
        self._cohort = {client.id: client for client in cohort}
        self._cohort_size = len(cohort)
        self._partial = partial
        self._listen = listen
        self._records = {id_: record for id_, record in partial.kept().items() if id_ in self._cohort}
        self._asked: dict[str, Asked] = {}
        self._bytes_down: dict[str, int] = {}
        self._timing = timing
        self._missed_deadline = False

    def excuse(self, client: str, reason: str) -> None:
        """Ask a client nothing in this round, since it already failed."""
        del self._cohort[client]
        if self._records.pop(client, None) is not None:
            self._partial.discard(client)
        self.failed[client] = reason
        self._listen(events.ClientDone(self._round, client, f"failed: {reason}"))

    @property
    def cohort(self) -> list[Client]:
        """Clients that take part."""
        return list(self._cohort.values())

    @property
    def waiting(self) -> list[Client]:
        """Clients that still have to train."""
        return [client for id_, client in self._cohort.items() if id_ not in self._records]

    def jobs(self, method: Method, state: Bundle) -> Iterator[Job]:
        """Yield the jobs of the clients that still have to train, one download at a time."""
        for client in self.waiting:
            download = method.dispatch(state, client, self._round)
            specs = method.expects(state, download)
            data = download.to_bytes()
            meta = download.content.meta
            given = meta.get("top_k"), meta.get("adapter_top_k"), meta.get("exploited")
            self._asked[client.id] = Asked(self._round, client.id, specs, *given)
            self._bytes_down[client.id] = len(data)
            yield Job(self._round, client.id, data)

    def receive(self, reply: Reply | ClientFailed) -> None:
        """Take a reply: keep it, refuse it by name, or note the failure.

        A client that sent anything inadmissible is quarantined for the round: what else it sent does not count.
        """
        if isinstance(reply, ClientFailed):
            self.failed[reply.client] = reply.reason
            problem: str | None = f"failed: {reply.reason}"
            sender = reply.client
        else:
            answered = set(self._records) | set(self.refused)
            sender, problem = admission.problem_of(reply, self._asked, answered)
            if problem is None:
                problem = self._keep(reply)
            if problem is not None:
                self.refused[sender] = problem
                if self._records.pop(sender, None) is not None:
                    self._partial.discard(sender)
                problem = f"refused: {problem}"
        self._listen(events.ClientDone(self._round, sender, problem))

    def close(self, min_replies: int) -> list[Payload]:
        """Return the admitted uploads sorted by client id.

        Raises:
            RoundFailed: if fewer than `min_replies` were admitted; it says what became of the others.
        """
        if len(self._records) < min_replies:
            others = [f"{name} failed: {why}" for name, why in sorted(self.failed.items())]
            others += [f"{name} refused: {why}" for name, why in sorted(self.refused.items())]
            raise RoundFailed(
                f"round {self._round}: {len(self._records)} of {self._cohort_size} clients gave a usable upload, "
                f"clients.min_replies is {min_replies} ({'; '.join(others)})"
            )
        return self._partial.uploads(sorted(self._records))

    @property
    def records(self) -> list[dict[str, Json]]:
        """Lines for clients.jsonl, sorted by client id."""
        return [self._records[name] for name in sorted(self._records)]

    def clock_seconds(self) -> float:
        """Return how long the round takes on the clock, up to the state after it. There must be one."""
        assert self._timing is not None, "only a round with a clock is timed"
        parts = [ClientTime(line["clock_seconds"], line["clock_idle_seconds"]) for line in self.records]
        server = clock.server_seconds(self._timing.server, sum(line["bytes_up"] for line in self.records))
        return clock.round_seconds(parts, server, self._timing.deadline_seconds if self._missed_deadline else None)

    def _keep(self, reply: Reply) -> str | None:
        """Keep an upload that can be used, unless its client missed the deadline: then return that."""
        payload = Payload.from_bytes(reply.upload)
        client, content = self._cohort[reply.client], payload.content
        counts = content.tensors.get(ACTIVATION_COUNTS)
        record: dict[str, Json] = {
            **content.meta["stats"],
            "round": self._round,
            "client": client.id,
            "tier": client.budget.tier,
            **{key: content.meta[key] for key in ("top_k", "adapter_top_k") if key in content.meta},
            "examples": content.meta["examples"],
            "bytes_down": self._bytes_down[client.id],
            "bytes_up": len(reply.upload),
            **reply.measured,
            "activation_counts": None if counts is None else counts.tolist(),
        }
        if self._timing is not None and client.budget.device is not None:
            stats, traffic = content.meta["stats"], (record["bytes_down"], record["bytes_up"])
            time = clock.client_time(client.budget.device, stats, *traffic)
            late = clock.lateness(self._timing, time.busy_seconds)
            if late is not None:
                self._missed_deadline = True
                return late
            record |= {"clock_seconds": time.busy_seconds, "clock_idle_seconds": time.idle_seconds}
        self._partial.keep(client.id, reply.upload, record)
        self._records[client.id] = record
        return None
