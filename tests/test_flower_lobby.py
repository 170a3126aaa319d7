"""How a deployment's clients come together, over a link that is in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import final

import pytest
from federations import config
from flwr.app import RecordDict

from emberfed import deployment
from emberfed.cli import split
from emberfed.config import parse
from emberfed.deployment import Home
from emberfed.errors import EngineError
from emberfed.events import Event, Notice
from emberfed.flower.conversation import Link, Lost
from emberfed.flower.desk import ClientSettings, Desk
from emberfed.flower.link import DeploymentConfig
from emberfed.flower.lobby import enrolled
from emberfed.flower.wire import Description, answered


@final
class Hall(Link):
    """A link to desks; a client without one never answers, and `again` forget the first message and come back."""

    def __init__(self, desks: Mapping[str, Desk | Description | None], again: tuple[str, ...] = ()) -> None:
        self.asked: list[str] = []
        self._desks = desks
        self._again = set(again)
        self._open: dict[str, tuple[str, RecordDict]] = {}

    def nodes(self) -> Mapping[str, int]:
        return {name: number for number, name in enumerate(self._desks)}

    def push(self, node: int, content: RecordDict, ttl_seconds: float) -> str:
        name = list(self._desks)[node]
        self.asked.append(name)
        message = f"{name} {len(self.asked)}"
        self._open[message] = name, content
        return message

    def pull(self, message: str) -> RecordDict | Lost | None:
        name, content = self._open[message]
        if name in self._again:
            self._again.remove(name)
            return Lost("its node connected anew", away=True)
        desk = self._desks[name]
        if isinstance(desk, Desk):
            return desk.answer(content)
        return None if desk is None else answered(desk)

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def home(tiny_model_folder: Path, tiny_data: Path) -> Home:
    return deployment.home(parse(config(tiny_model_folder, tiny_data, clients={"count": 2})))


@pytest.fixture(scope="module")
def desks(
    home: Home, tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Desk]:
    """Four desks, of a federation that counts two."""
    folder = tmp_path_factory.mktemp("lobby")
    parts = split.split(parse(config(tiny_model_folder, tiny_data)), folder / "parts")
    return {
        part.client: Desk(home.config, ClientSettings(part.client, part.tier, part.folder, folder / part.client))
        for part in parts
    }


def told(hall: Hall, home: Home, seconds: float = 60.0) -> tuple[list[str], list[str]]:
    heard: list[Event] = []
    found = enrolled(home, hall, DeploymentConfig(join_seconds=seconds), heard.append)
    return [one.id for one in found], [event.message for event in heard if isinstance(event, Notice)]


def test_nobody_waits_for_a_client_that_does_not_answer(home: Home, desks: dict[str, Desk]) -> None:
    names, lines = told(Hall({"slow": None, "c0": desks["c0"], "c1": desks["c1"]}), home)
    assert names == ["c0", "c1"]
    assert [line.partition(" (")[0] for line in lines[1:]] == ["client c0 joined", "client c1 joined"]


def test_who_comes_back_is_asked_again(home: Home, desks: dict[str, Desk]) -> None:
    hall = Hall({"c0": desks["c0"], "c1": desks["c1"]}, again=("c1",))
    assert told(hall, home)[0] == ["c0", "c1"]
    assert hall.asked == ["c0", "c1", "c1"]


def test_too_few_are_named_with_those_turned_away(home: Home, desks: dict[str, Desk]) -> None:
    lying = Description({"problem": "no data\x1b[2J\nhere"})
    with pytest.raises(EngineError) as raised:
        told(Hall({"c0": desks["c0"], "c9": lying}), home, seconds=0.5)
    line = str(raised.value)
    assert line.startswith("1 of 2 clients joined within 0.5 s (engine.join_seconds): c0; c9 cannot take part: no data")
    assert line.isprintable(), "whatever a client says is one line"


def test_a_client_that_says_it_is_another_is_turned_away(home: Home, desks: dict[str, Desk]) -> None:
    with pytest.raises(
        EngineError, match="c1 cannot take part: it says it is client 'c0'; its key is registered as 'c1'"
    ):
        told(Hall({"c1": desks["c0"]}), home, seconds=0.1)
