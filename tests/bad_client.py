"""A client of a deployment that goes wrong: `python bad_client.py FAULTS`, and then what `emberfed` takes.

It is `emberfed client` but for what leaves its desk: in the first round the first of FAULTS (with commas between), and
so on; after them it is honest. Faults are those that the flaky engine spoils uploads by, and these:

    foreign-message     nothing that emberfed sends
    measured            measurements that would overwrite what the server counted
    pages               a failure whose reason is pages of text and a terminal's commands
    twice               an honest answer, and a spoiled one after it
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from emberfed.cli import main
from emberfed.engines.flaky import Fault, spoil
from emberfed.errors import RunFolderError
from emberfed.flower import node
from emberfed.flower.desk import Desk
from emberfed.flower.wire import answered, read_answered
from emberfed.records import ClientFailed, Reply

PAGES = "\n\x1b[31mred\x1b[0m " * 50_000


def spoiled(reply: Reply, fault: str) -> RecordDict:
    """Return the content of a message instead of the honest reply's."""
    special: Mapping[str, Callable[[], RecordDict]] = {
        "foreign-message": lambda: RecordDict({"parameters": ConfigRecord({"loss": 0.5})}),
        "measured": lambda: answered(replace(reply, measured={**reply.measured, "examples": 1e9})),
        "pages": lambda: answered(ClientFailed(reply.round, reply.client, PAGES)),
        "twice": lambda: answered(reply),
    }
    if fault in special:
        return special[fault]()
    return answered(replace(reply, upload=spoil(reply.upload, cast(Fault, fault))))


def go_wrong(faults: list[str]) -> None:
    """Make this process's desk and node do so."""
    honest, push = Desk.answer, node._push

    def fault_of(reply: object) -> str | None:
        return faults[reply.round - 1] if isinstance(reply, Reply) and reply.round <= len(faults) else None

    def answer(self: Desk, content: RecordDict) -> RecordDict:
        told = honest(self, content)
        reply = read_answered(told)
        fault = fault_of(reply)
        return told if fault is None else spoiled(cast(Reply, reply), fault)

    def push_twice(client: Any, reply: Message, to: Any) -> None:
        push(client, reply, to)
        with suppress(RunFolderError):
            found = read_answered(reply.content)
            if fault_of(found) == "twice":
                told = reply.metadata
                ids = told.run_id, "", told.src_node_id, told.dst_node_id, told.reply_to_message_id, told.group_id
                again = Metadata(*ids, told.created_at, told.ttl, told.message_type)
                with suppress(Exception):
                    push(client, make_message(again, spoiled(cast(Reply, found), "nan")), to)

    Desk.answer = answer  # type: ignore[method-assign]
    node._push = push_twice  # type: ignore[assignment]


if __name__ == "__main__":
    go_wrong(sys.argv.pop(1).split(","))
    main()
