"""Questions over a link that loses, delays, repeats and corrupts, on a clock that only moves when somebody waits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import pytest
from flwr.app import ConfigRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from emberfed.errors import EngineError
from emberfed.flower.conversation import Ask, Conversation, ConversationConfig, Link, Lost, exchange
from emberfed.flower.wire import Asked, Description, Hello, answered, asked, read_answered, read_asked
from emberfed.records import ClientFailed, Job, Question, Reply

Answer = Callable[[Asked], RecordDict | Lost | None]
"""What a node makes of a question; None: it never answers."""


SERVER = Hello("the run", {"version": "1"})


@final
class _Clock:
    """Seconds that pass only in `pause`; what is due at a time happens before the pause ends."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.pauses: list[float] = []
        self._due: list[tuple[float, Callable[[], None]]] = []

    def now(self) -> float:
        return self.seconds

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        until = self.seconds + seconds
        while due := [entry for entry in self._due if entry[0] <= until]:
            first = min(due, key=lambda entry: entry[0])
            self._due.remove(first)
            self.seconds = max(self.seconds, first[0])
            first[1]()
        self.seconds = until

    def at(self, seconds: float, what: Callable[[], None]) -> None:
        if seconds <= self.seconds:
            what()
        else:
            self._due.append((seconds, what))


@final
@dataclass
class _Node:
    """A client on its device: how long it takes, and what it answers; whether it is connected."""

    answer: Answer
    takes_seconds: float = 1.0
    connected: bool = True
    asked: list[Asked] = field(default_factory=list)


@final
class _Network(Link):
    """A link in memory: messages to nodes, and what came of them.

    A node that is cut off forgets what it is at: it works on no message that was sent before, and nobody hears of it.
    """

    def __init__(self, clock: _Clock, nodes: Mapping[str, _Node]) -> None:
        self.clock = clock
        self.by_client = dict(nodes)
        self.ids = {name: 1000 + index for index, name in enumerate(nodes)}
        self.replies: dict[str, RecordDict | Lost] = {}
        self.pushed: list[tuple[str, float, float]] = []
        self.pulled: list[str] = []
        self.most_open = 0
        self._open: dict[str, str] = {}

    def nodes(self) -> Mapping[str, int]:
        return {name: self.ids[name] for name, node in self.by_client.items() if node.connected}

    def push(self, node: int, content: RecordDict, ttl_seconds: float) -> str:
        (client,) = [name for name, id_ in self.ids.items() if id_ == node]
        message = f"m{len(self.pushed)}"
        self.pushed.append((client, self.clock.seconds, ttl_seconds))
        self._open[message] = client
        self.most_open = max(self.most_open, len(self._open))
        device = self.by_client[client]
        heard = read_asked(content)
        assert isinstance(heard, Asked)
        device.asked.append(heard)
        self.clock.at(self.clock.seconds + device.takes_seconds, lambda: self._done(message, heard))
        return message

    def pull(self, message: str) -> RecordDict | Lost | None:
        self.pulled.append(message)
        found = self.replies.pop(message, None)
        if found is not None:
            self._open.pop(message, None)
        return found

    def close(self) -> None:
        self.by_client.clear()

    def cut(self, client: str, *, tell: bool) -> None:
        """The node goes away, and forgets; `tell`: whoever waits hears that its messages are lost."""
        self.by_client[client].connected = False
        for message in [message for message, to in self._open.items() if to == client and message not in self.replies]:
            del self._open[message]
            if tell:
                self.replies[message] = Lost("the node is gone", away=True)

    def back(self, client: str) -> None:
        self.by_client[client].connected = True

    def _done(self, message: str, heard: Asked) -> None:
        client = self._open.get(message)
        if client is None:
            return
        found = self.by_client[client].answer(heard)
        if found is not None:
            self.replies[message] = found


class _Echo(Link):
    """A link whose nodes describe themselves."""

    def nodes(self) -> Mapping[str, int]:
        return {"a": 1, "b": 2}

    def push(self, node: int, content: RecordDict, ttl_seconds: float) -> str:
        return str(node)

    def pull(self, message: str) -> RecordDict | Lost | None:
        return answered(Description({"node": message}))

    def close(self) -> None:
        pass


@final
class _Gone(_Echo):
    """A link that breaks once something was sent."""

    def pull(self, message: str) -> RecordDict | Lost | None:
        raise EngineError("the SuperLink is gone")


def question(client: str, round: int = 3) -> Job:
    return Job(round, client, f"down {client}".encode())


def good(heard: Asked) -> RecordDict:
    asked_ = heard.question
    return answered(
        Reply(asked_.round, asked_.client, b"up " + asked_.download, {"seconds": 1.0, "peak_memory_bytes": 2.0})
    )


def expected(client: str) -> Reply:
    return Reply(3, client, f"up down {client}".encode(), {"seconds": 1.0, "peak_memory_bytes": 2.0})


def federation(**nodes: _Node) -> tuple[_Clock, _Network]:
    clock = _Clock()
    return clock, _Network(clock, nodes)


def conversation(clock: _Clock, network: Link, **settings: Any) -> Conversation:
    config = ConversationConfig(**{"deadline_seconds": 100.0, "return_seconds": 30.0, **settings})
    tiers = {name: f"tier of {name}" for name in ("a", "b", "c", "d", "e")}
    return Conversation(network, SERVER, tiers, config, clock.now, clock.pause)


def reason(outcome: Reply | ClientFailed) -> str:
    assert isinstance(outcome, ClientFailed)
    assert outcome.round == 3
    return outcome.reason


# ------------------------------------------------------------------------------------------ when all goes well


def test_replies_come_in_the_order_in_which_clients_end_and_nodes_hear_the_run_and_their_tier() -> None:
    clock, network = federation(a=_Node(good, 3.0), b=_Node(good, 1.0), c=_Node(good, 2.0))
    replies = list(conversation(clock, network).map(question(name) for name in "abc"))
    assert replies == [expected("b"), expected("c"), expected("a")]
    heard = network.by_client["b"].asked
    assert heard == [Asked(SERVER, "tier of b", question("b"))]
    assert [(client, ttl) for client, _, ttl in network.pushed] == [("a", 100.0), ("b", 100.0), ("c", 100.0)]


def test_no_more_questions_are_formed_than_may_be_out() -> None:
    """Of five, two at a time; a question is formed only once a reply has been taken."""
    clock, network = federation(**{name: _Node(good, 1.0) for name in "abcde"})
    formed: list[str] = []

    def questions() -> Iterator[Question]:
        for name in "abcde":
            formed.append(name)
            yield question(name)

    taken = 0
    for reply in conversation(clock, network, in_flight=2).map(questions()):
        assert reply == expected(reply.client)
        taken += 1
        assert len(formed) <= taken + 2
    assert (taken, formed) == (5, list("abcde"))
    assert network.most_open == 2


def test_a_client_is_asked_one_thing_at_a_time() -> None:
    """Client a is asked twice and takes 2 s for each; what comes after the second waits with it."""
    clock, network = federation(a=_Node(good, 2.0), b=_Node(good, 1.0))
    replies = list(conversation(clock, network).map([question("a"), question("a", 4), question("b")]))
    assert [(reply.client, reply.round) for reply in replies] == [("a", 3), ("b", 3), ("a", 4)]
    first, second, third = (seconds for _, seconds, _ in network.pushed)
    assert first == 0
    assert 2 <= second <= third <= 2.5


def test_nothing_to_ask_asks_nothing() -> None:
    clock, network = federation(a=_Node(good))
    assert list(conversation(clock, network).map([])) == []
    assert (network.pushed, clock.pauses) == ([], [])


def test_looks_for_replies_become_rarer_while_there_are_none() -> None:
    """From 0.1 s by a fifth each time up to 0.5 s, and from 0.1 s again after a reply."""
    clock, network = federation(a=_Node(good, 5.0), b=_Node(good, 5.5))
    list(conversation(clock, network).map([question("a"), question("b")]))
    assert clock.pauses[:3] == pytest.approx([0.1, 0.12, 0.144])
    again = clock.pauses.index(0.1, 1)
    assert max(clock.pauses) == clock.pauses[again - 1] == 0.5
    assert clock.seconds < 5.5 + 0.5


# ------------------------------------------------------------------------------------------ faults of nodes


def test_a_client_that_never_answers_fails_at_its_deadline_and_holds_nobody_up() -> None:
    clock, network = federation(a=_Node(lambda heard: None), b=_Node(good), c=_Node(good))
    replies = list(conversation(clock, network).map(question(name) for name in "abc"))
    assert replies[:2] == [expected("b"), expected("c")]
    assert "no reply within 100 s" in reason(replies[2])
    assert 100 <= clock.seconds < 101


def test_a_round_has_a_deadline_of_its_own_for_all_that_are_not_answered() -> None:
    """One at a time: a answers after 10 s, b never, and c is not even asked once the round's 30 s are over."""
    clock, network = federation(a=_Node(good, 10.0), b=_Node(lambda heard: None), c=_Node(good))
    talk = conversation(clock, network, in_flight=1, round_deadline_seconds=30.0)
    replies = list(talk.map(question(name) for name in "abc"))
    assert replies[0] == expected("a")
    assert [one.client for one in replies[1:]] == ["b", "c"]
    assert {reason(one) for one in replies[1:]} == {"no reply within the round's 30 s (engine.round_deadline_seconds)"}
    assert 30 <= clock.seconds < 31
    assert [client for client, _, _ in network.pushed] == ["a", "b"]
    (reply,) = talk.map([question("a", round=4)])
    assert isinstance(reply, Reply), "the next round has its own"


def test_a_late_reply_is_never_fetched() -> None:
    """Client a answers 20 s after its deadline, while the next round is under way."""
    clock, network = federation(a=_Node(good, 120.0))
    talk = conversation(clock, network)
    (late,) = talk.map([question("a")])
    assert "no reply" in reason(late)
    network.by_client["a"].takes_seconds = 50.0
    (reply,) = talk.map([question("a", round=4)])
    assert reply == Reply(4, "a", b"up down a", {"seconds": 1.0, "peak_memory_bytes": 2.0})
    assert "m0" in network.replies


@pytest.mark.parametrize("tell", [True, False], ids=["flower tells", "silently"])
def test_a_node_that_went_away_is_asked_again_when_it_is_back(tell: bool) -> None:
    """It is cut off after 2 of 10 s, and back at 20 s; the second message may live as long as the deadline leaves."""
    clock, network = federation(a=_Node(good, 10.0), b=_Node(good, 1.0))
    clock.at(2.0, lambda: network.cut("a", tell=tell))
    clock.at(20.0, lambda: network.back("a"))
    replies = list(conversation(clock, network).map([question("a"), question("b")]))
    assert replies == [expected("b"), expected("a")]
    times = [(seconds, ttl) for client, seconds, ttl in network.pushed if client == "a"]
    assert times[0] == (0.0, 100.0)
    assert 20 <= times[1][0] <= 20.5
    assert sum(times[1]) == pytest.approx(100.0)
    assert network.by_client["a"].asked[0] == network.by_client["a"].asked[1]


def test_a_node_that_began_anew_between_two_looks_is_asked_again_at_once() -> None:
    """It is never seen to be away; the link tells that the message is forgotten."""
    clock, network = federation(a=_Node(good, 10.0))

    def anew() -> None:
        network.cut("a", tell=True)
        network.back("a")

    clock.at(2.0, anew)
    assert list(conversation(clock, network).map([question("a")])) == [expected("a")]
    assert 2 <= network.pushed[1][1] <= 3


def test_a_node_that_stays_away_fails_after_the_time_it_has_to_return() -> None:
    clock, network = federation(a=_Node(good, 10.0), b=_Node(good, 1.0))
    clock.at(2.0, lambda: network.cut("a", tell=False))
    replies = list(conversation(clock, network).map([question("a"), question("b")]))
    assert replies[0] == expected("b")
    assert reason(replies[1]) == "its node was not connected for 30 s (engine.return_seconds)"
    assert 32 <= clock.seconds <= 33
    assert len(network.pushed) == 2


def test_a_client_that_was_never_there_is_sent_nothing_and_fails() -> None:
    clock, network = federation(b=_Node(good))
    replies = list(conversation(clock, network).map([question("a"), question("b")]))
    assert replies[0] == expected("b")
    assert "not connected for 30 s" in reason(replies[1])
    assert [client for client, _, _ in network.pushed] == ["b"]


def test_a_client_that_joins_late_is_asked_then() -> None:
    clock, network = federation(a=_Node(good, connected=False))
    clock.at(15.0, lambda: network.back("a"))
    assert list(conversation(clock, network).map([question("a")])) == [expected("a")]
    assert 15 <= network.pushed[0][1] <= 15.5


def test_a_node_that_was_only_cut_off_may_answer_its_first_message() -> None:
    """The network fails from 2 to 5 s, unseen by the node, which answers at 10 s; its second answer is not wanted."""
    clock, network = federation(a=_Node(good, 10.0))
    clock.at(2.0, lambda: setattr(network.by_client["a"], "connected", False))
    clock.at(5.0, lambda: network.back("a"))
    assert list(conversation(clock, network).map([question("a")])) == [expected("a")]
    assert len(network.pushed) == 2
    assert 10 <= clock.seconds <= 11


def test_a_node_that_cannot_answer_fails_at_once_and_is_not_asked_again() -> None:
    clock, network = federation(a=_Node(lambda heard: Lost("its app raised", away=False)))
    (failed,) = conversation(clock, network).map([question("a")])
    assert reason(failed) == "its app raised"
    assert len(network.pushed) == 1


def test_what_a_leaving_node_says_does_not_count_while_it_may_return() -> None:
    """A node that is told to stop answers with an error on its way out, as far as Flower knows; it is back at 9 s."""
    clock, network = federation(a=_Node(lambda heard: Lost("it was stopped", away=False), 2.0))
    clock.at(1.5, lambda: setattr(network.by_client["a"], "connected", False))
    clock.at(8.0, lambda: setattr(network.by_client["a"], "answer", good))
    clock.at(9.0, lambda: network.back("a"))
    assert list(conversation(clock, network).map([question("a")])) == [expected("a")]


def test_a_node_that_comes_and_goes_fails_at_its_deadline() -> None:
    clock, network = federation(a=_Node(good, 10.0))
    for second in range(2, 400, 8):
        clock.at(float(second), lambda: network.cut("a", tell=True))
        clock.at(second + 3.0, lambda: network.back("a"))
    (failed,) = conversation(clock, network).map([question("a")])
    assert "no reply within 100 s" in reason(failed)
    assert clock.seconds < 101
    assert 10 <= len(network.pushed) <= 14


# ------------------------------------------------------------------------------------------ bad answers


def _measuring(measured: Mapping[str, float]) -> Answer:
    return lambda heard: answered(Reply(3, "a", b"x", measured))


def _other(round: int, client: str) -> Answer:
    return lambda heard: answered(Reply(round, client, b"x", {}))


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (_other(2, "a"), "answered for client 'a' in round 2"),
        (_other(3, "b"), "answered for client 'b' in round 3"),
        (lambda heard: answered(ClientFailed(2, "a", "sleepless")), "answered for client 'a' in round 2"),
        (lambda heard: answered(ClientFailed(3, "a", "sleepless")), "sleepless"),
        (lambda heard: answered(Description({"version": "1"})), "described itself"),
        (lambda heard: RecordDict(), "without emberfed's record"),
        (_measuring({"seconds": 1.0}), "it measured seconds, not peak_memory_bytes, seconds"),
        (_measuring({"seconds": 1.0, "peak_memory_bytes": 2.0, "examples": 9.0}), "it measured examples"),
        (_measuring({"seconds": math.nan, "peak_memory_bytes": 2.0}), "not numbers from 0"),
        (_measuring({"seconds": -1.0, "peak_memory_bytes": 2.0}), "not numbers from 0"),
        (lambda heard: answered(ClientFailed(3, "a", "no\n\x1b[31mway")), "no [31mway"),
        (lambda heard: asked(Hello("x", {})), "answered with 'hello'"),
    ],
)
def test_an_answer_to_something_else_is_a_failure_of_the_client_that_was_asked(answer: Answer, words: str) -> None:
    clock, network = federation(a=_Node(answer), b=_Node(good, 9.0))
    replies = list(conversation(clock, network).map([question("a"), question("b")]))
    assert words in reason(replies[0])
    assert (replies[0].client, replies[1]) == ("a", expected("b"))


def test_pages_of_reasons_are_cut_to_a_line() -> None:
    clock, network = federation(a=_Node(lambda heard: answered(ClientFailed(3, "a", "\n\x1b[31mred" * 10**6))))
    (failed,) = conversation(clock, network).map([question("a")])
    assert reason(failed).isprintable()
    assert len(reason(failed)) < 1100


def test_a_second_answer_is_not_fetched() -> None:
    clock, network = federation(a=_Node(good), b=_Node(good, 5.0))
    replies = []
    for reply in conversation(clock, network).map([question("a"), question("b")]):
        network.replies["m0"] = answered(Reply(3, "a", b"again", {}))
        replies.append(reply)
    assert replies == [expected("a"), expected("b")]
    assert network.pulled.count("m0") < network.pulled.count("m1")


def test_a_link_that_is_gone_for_good_stops_the_run() -> None:
    clock = _Clock()
    with pytest.raises(EngineError, match="SuperLink is gone"):
        list(conversation(clock, _Gone()).map([question("a")]))


# ------------------------------------------------------------------------------------------ whatever happens


FATES = ("good", "silent", "cut", "blink", "raise", "garbage", "absent")


def _node(fate: str, takes: float) -> _Node:
    answers: dict[str, Answer] = {
        "silent": lambda heard: None,
        "raise": lambda heard: Lost("it raised", away=False),
        "garbage": lambda heard: RecordDict({"emberfed": ConfigRecord({"kind": "reply", "round": 3, "client": "a"})}),
    }
    return _Node(answers.get(fate, good), takes, connected=fate != "absent")


@given(
    st.dictionaries(st.sampled_from("abcde"), st.tuples(st.sampled_from(FATES), st.floats(0.1, 40)), min_size=1),
    st.integers(1, 6),
)
def test_every_question_has_one_outcome_whatever_happens(
    fates: Mapping[str, tuple[str, float]], in_flight: int
) -> None:
    """Good clients reply, also if they were gone for 3 s; others fail; each within the deadline of its question."""
    clock, network = federation(**{name: _node(*fate) for name, fate in fates.items()})
    for name, (fate, takes) in fates.items():
        if fate in ("cut", "blink"):
            clock.at(takes / 2, lambda name=name: network.cut(name, tell=False))  # type: ignore[misc]
        if fate == "blink":
            clock.at(takes / 2 + 3, lambda name=name: network.back(name))  # type: ignore[misc]
    talk = conversation(clock, network, in_flight=in_flight)
    outcomes = {reply.client: reply for reply in talk.map(question(name) for name in sorted(fates))}
    assert sorted(outcomes) == sorted(fates)
    for name, (fate, _) in fates.items():
        if fate in ("good", "blink"):
            assert outcomes[name] == expected(name)
        if fate in ("silent", "raise", "garbage", "absent"):
            assert isinstance(outcomes[name], ClientFailed)
    assert clock.seconds <= 101 * len(fates)


def test_other_things_than_questions_can_be_exchanged() -> None:
    clock = _Clock()
    config = ConversationConfig()
    asks = [Ask(name.upper(), name, lambda: asked(Hello("run", {}))) for name in "ab"]
    found = {
        about: read_answered(answer)
        for about, answer in exchange(_Echo(), asks, config, clock.now, clock.pause)
        if not isinstance(answer, str)
    }
    assert found == {"A": Description({"node": "1"}), "B": Description({"node": "2"})}


def test_a_conversation_s_own_clock_is_the_machine_s() -> None:
    """A reply that is there at once needs no pause, nor does a silence that may last no time at all."""
    _, network = federation(a=_Node(good, 0.0), b=_Node(lambda heard: None))
    settings = ConversationConfig(deadline_seconds=1e-9, poll_seconds=1e-3)
    replies = list(Conversation(network, SERVER, {"a": "s", "b": "s"}, settings).map([question("a"), question("b")]))
    assert all("no reply within" in reason(reply) for reply in replies)
    (reply,) = Conversation(network, SERVER, {"a": "s"}, ConversationConfig(poll_seconds=1e-3)).map([question("a")])
    assert reply == expected("a")
