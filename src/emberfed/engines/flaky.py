"""An engine that misbehaves on demand: it shuffles, delays, drops, repeats and corrupts, the same way every time.

It ships with the package so that tests, and users who want to know how a federation copes, need no mocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Literal, final

import torch
from pydantic import Field

from emberfed.engine import Engine
from emberfed.records import Assessment, Bundle, ClientFailed, Payload, Question, Reply
from emberfed.sections import Section
from emberfed.seeds import Seeds

Fault = Literal[
    "drop",
    "raise",
    "nan",
    "shape",
    "dtype",
    "missing",
    "foreign",
    "weight",
    "old_round",
    "twice",
    "garbage",
    "stranger",
]

_OF_TENSORS = ("nan", "shape", "dtype", "missing", "foreign")


class FlakyConfig(Section):
    """What goes wrong, and for whom.

    Attributes:
        seed: Address of the shuffle.
        shuffle: Bring replies back in a random order.
        delay_seconds: Wait before each reply.
        faults: Client id -> what happens to its reply in every round of `rounds`.
        rounds: Rounds in which faults strike; empty: all.
    """

    seed: int = 0
    shuffle: bool = True
    delay_seconds: float = Field(0.0, ge=0)
    faults: dict[str, Fault] = Field(default_factory=dict)
    rounds: list[int] = Field(default_factory=list)


@final
class FlakyEngine(Engine):
    """The local engine behind a bad network with bad clients."""

    Config = FlakyConfig

    def map(self, questions: Iterable[Question]) -> Iterator[Reply | ClientFailed]:
        """Ask, and spoil the replies as configured."""
        config: FlakyConfig = self.config
        asked = []
        replies: list[Reply | ClientFailed] = []
        for question in questions:
            asked.append(question)
            replies += self._answers(question)
        if config.shuffle and replies:
            order = Seeds(config.seed).at(round=replies[0].round).numpy("flaky order").permutation(len(replies))
            replies = [replies[index] for index in order]
        for reply in replies:
            time.sleep(config.delay_seconds)
            yield reply
        for question in asked:
            self.clients.idle(question)

    def _answers(self, question: Question) -> list[Reply | ClientFailed]:
        config: FlakyConfig = self.config
        fault = config.faults.get(question.client)
        if fault is None or (config.rounds and question.round not in config.rounds):
            return [self.clients.answer(question)]
        if isinstance(question, Assessment) and fault in _OF_TENSORS:
            return [self.clients.answer(question)]  # its answer has none
        if fault == "drop":
            return [ClientFailed(question.round, question.client, "no reply (dropped by the flaky engine)")]
        if fault == "raise":
            return [self.clients.answer(replace(question, download=b"not a payload"))]
        reply = self.clients.answer(question)
        if isinstance(reply, ClientFailed):
            return [reply]
        if fault == "twice":
            return [reply, reply]
        return [replace(reply, upload=spoil(reply.upload, fault))]


def spoil(upload: bytes, fault: Fault) -> bytes:
    """Return the upload's bytes with one thing wrong in them."""
    if fault == "garbage":
        return upload[: len(upload) // 2]
    payload = Payload.from_bytes(upload)
    tensors, meta = dict(payload.content.tensors), dict(payload.content.meta)
    if fault in _OF_TENSORS:
        tensors = _spoiled(tensors, fault)
    if fault == "weight":
        meta["examples"] = -1
    round_ = payload.round - 1 if fault == "old_round" else payload.round
    client = "nobody" if fault == "stranger" else payload.client
    return Payload(round_, client, Bundle(tensors, meta)).to_bytes()


def _spoiled(given: Mapping[str, torch.Tensor], fault: Fault) -> dict[str, torch.Tensor]:
    """Return tensors with one thing wrong in them."""
    tensors = dict(given)
    names = sorted(tensors)
    name = next((key for key in names if tensors[key].is_floating_point()), names[0])  # surveys hold counts alone
    spoiled = tensors.pop(name)
    if fault == "foreign":
        tensors["a.stranger"] = spoiled.clone()
    if fault == "nan":
        spoiled = spoiled.clone()
        spoiled.view(-1)[-1] = torch.nan if spoiled.is_floating_point() else -1
    if fault == "shape":
        spoiled = spoiled[..., :1].contiguous()
    if fault == "dtype":
        spoiled = spoiled.to(torch.float64)
    if fault != "missing":
        tensors[name] = spoiled
    return tensors
