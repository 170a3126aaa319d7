"""Questions and replies over Flower's messages, with deadlines and re-sends of our own.

Flower loses the message of a node that was killed without a word, and its own loop polls every three seconds. Here
every question has a deadline, and one whose node went away is asked again when the node is back.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Protocol, TypeVar, final

from flwr.app import RecordDict
from pydantic import Field

from emberfed.errors import RunFolderError
from emberfed.flower.wire import Asked, Description, Hello, as_line, asked, read_answered
from emberfed.records import Assessment, ClientFailed, Question, Reply
from emberfed.sections import Section

T = TypeVar("T")

_POLL_GROWTH = 1.2
_SLOWEST_POLL = 5


@final
@dataclass(frozen=True, slots=True)
class Lost:
    """There will be no reply to a message.

    Attributes:
        reason: Why, in one line.
        away: Whether it is because the node is, or was, away: the question may then be asked again once it is back.
    """

    reason: str
    away: bool


class Link(Protocol):
    """What carries messages. A link that is away for a while is waited for.

    Every method but `close` raises `EngineError`, one line, if the link is gone for good.
    """

    def nodes(self) -> Mapping[str, int]:
        """Return the Flower node of each client that is connected now, by client id."""
        ...

    def push(self, node: int, content: RecordDict, ttl_seconds: float) -> str:
        """Send to a node; return the message's id."""
        ...

    def pull(self, message: str) -> RecordDict | Lost | None:
        """Return a message's reply, why there will be none, or nothing if there is none yet.

        A node that began anew after the push has forgotten the message: that is `Lost` with `away`, too.
        """
        ...

    def close(self) -> None:
        """Let go of it. Safe to call twice."""
        ...


class ConversationConfig(Section):
    """How long clients and the link to them are waited for.

    Attributes:
        deadline_seconds: A question that is not answered so long after it was formed has failed.
        round_deadline_seconds: So long after a round's first question all without an answer have failed; null: never.
        return_seconds: How long a client whose node is not connected is waited for, before its question has failed.
        in_flight: Questions that are out at once: so many clients train at a time, and so many downloads are kept.
        poll_seconds: Pause between looks for replies; it grows to five times that while there are none.
        patience_seconds: How long a SuperLink that is away is waited for.
    """

    deadline_seconds: float = Field(3600.0, gt=0)
    round_deadline_seconds: float | None = Field(None, gt=0)
    return_seconds: float = Field(180.0, ge=0)
    in_flight: int = Field(16, ge=1)
    poll_seconds: float = Field(0.1, gt=0)
    patience_seconds: float = Field(120.0, ge=0)


@final
@dataclass(frozen=True, slots=True)
class Ask(Generic[T]):
    """Something to send to a client.

    Attributes:
        about: What it is, for whoever asks.
        client: The client's id.
        content: Makes the message's content; called again for every re-send.
    """

    about: T
    client: str
    content: Callable[[], RecordDict]


def exchange(
    link: Link,
    asks: Iterable[Ask[T]],
    settings: ConversationConfig,
    now: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> Iterator[tuple[T, RecordDict | str]]:
    """Send all, and yield what each was about with its reply, or one line that says why there is none, as they come.

    `asks` is taken lazily, replies are fetched one at a time, and a client is sent nothing more before it has settled
    what it was sent.

    Args:
        link: What carries messages.
        asks: What to send.
        settings: How long to wait.
        now: A clock, in seconds.
        pause: Waits so many seconds.

    Raises: EngineError if the link is gone for good.
    """
    remaining = iter(asks)
    round_seconds = settings.round_deadline_seconds
    end = math.inf if round_seconds is None else now() + round_seconds
    coming: Ask[T] | None = None
    under_way: list[_UnderWay[T]] = []
    poll_seconds = settings.poll_seconds
    while True:
        while len(under_way) < settings.in_flight:
            coming = coming or next(remaining, None)
            if coming is None or any(one.ask.client == coming.client for one in under_way):
                break
            under_way.append(_due(coming, now() + settings.deadline_seconds, end, settings))
            coming = None
        if not under_way:
            return
        nodes = link.nodes()
        settled = False
        for one in list(under_way):
            answer = one.step(link, nodes, settings, now)
            if answer is not None:
                under_way.remove(one)
                settled = True
                yield one.ask.about, answer
        if settled:
            poll_seconds = settings.poll_seconds
        else:
            pause(poll_seconds)
            poll_seconds = min(poll_seconds * _POLL_GROWTH, settings.poll_seconds * _SLOWEST_POLL)


@final
class Conversation:
    """The questions of one run."""

    def __init__(
        self,
        link: Link,
        hello: Hello,
        tiers: Mapping[str, str],
        settings: ConversationConfig,
        now: Callable[[], float] = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        """Take what is needed to ask.

        Args:
            link: What carries messages.
            hello: Who asks: the run's identity, and what the server expects of clients.
            tiers: The name of each client's tier, by client id.
            settings: How long to wait.
            now: A clock, in seconds.
            pause: Waits so many seconds.
        """
        self._link = link
        self._hello = hello
        self._tiers = tiers
        self._settings = settings
        self._now = now
        self._pause = pause

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask, and yield one value for each question, as replies come.

        A reply to an earlier question, or one that comes too late, is never fetched.

        Raises: EngineError if the link is gone for good.
        """
        asks = (Ask(question, question.client, partial(self._content, question)) for question in questions)
        for question, answer in exchange(self._link, asks, self._settings, self._now, self._pause):
            yield _reply(question, answer)

    def _content(self, question: Question) -> RecordDict:
        return asked(Asked(self._hello, self._tiers[question.client], question))


@final
@dataclass(slots=True, eq=False)
class _UnderWay(Generic[T]):
    """An ask that has no answer yet, and the messages it was sent in: whichever is answered first counts."""

    ask: Ask[T]
    deadline: float
    too_late: str
    messages: list[str] = field(default_factory=list)
    away_since: float | None = None

    def step(
        self, link: Link, nodes: Mapping[str, int], settings: ConversationConfig, now: Callable[[], float]
    ) -> RecordDict | str | None:
        """Look for the reply, and send what has to be sent; return the reply or why there is none, once it is known."""
        failed = None
        for message in list(self.messages):
            answer = link.pull(message)
            if isinstance(answer, RecordDict):
                return answer
            if answer is not None:
                self.messages.remove(message)
                failed = None if answer.away else answer.reason
        node = nodes.get(self.ask.client)
        if failed is not None and node is not None and not self.messages:
            return failed
        time_seconds = now()
        if time_seconds >= self.deadline:
            return self.too_late
        if node is None:
            self.away_since = time_seconds if self.away_since is None else self.away_since
            if time_seconds - self.away_since >= settings.return_seconds:
                return f"its node was not connected for {settings.return_seconds:g} s (engine.return_seconds)"
        elif self.away_since is not None or not self.messages:
            # A node that was away may have forgotten what it was asked, and nobody would tell.
            self.away_since = None
            self.messages.append(link.push(node, self.ask.content(), self.deadline - time_seconds))
        return None


def _due(ask: Ask[T], own: float, end: float, settings: ConversationConfig) -> _UnderWay[T]:
    """Return an ask with the earlier of two deadlines: its own, and that of the round."""
    if own <= end:
        return _UnderWay(ask, own, f"no reply within {settings.deadline_seconds:g} s (engine.deadline_seconds)")
    told = f"no reply within the round's {settings.round_deadline_seconds:g} s (engine.round_deadline_seconds)"
    return _UnderWay(ask, end, told)


def _reply(question: Question, answer: RecordDict | str) -> Reply | ClientFailed:
    """Return the answer to a question, whatever a client sent."""
    try:
        found = answer if isinstance(answer, str) else read_answered(answer)
    except RunFolderError as error:
        found = str(error)
    if isinstance(found, Description):
        found = "it described itself where it was asked a question"
    if isinstance(found, str):
        return ClientFailed(question.round, question.client, as_line(found))
    if (found.round, found.client) != (question.round, question.client):
        reason = f"it answered for client {found.client!r} in round {found.round}, which it was not asked"
        return ClientFailed(question.round, question.client, as_line(reason))
    if isinstance(found, Reply) and sorted(found.measured) != _measured(question):
        reason = f"it measured {', '.join(sorted(found.measured)) or 'nothing'}, not {', '.join(_measured(question))}"
        return ClientFailed(question.round, question.client, as_line(reason))
    return found


def _measured(question: Question) -> list[str]:
    """Return the names of what a client measures for an answer: they go into its record as they are."""
    return ["seconds"] if isinstance(question, Assessment) else ["peak_memory_bytes", "seconds"]
