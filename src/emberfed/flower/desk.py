"""A client of a deployment: it has a folder of data, and answers what a server asks. Model and data load once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from flwr.app import RecordDict

from emberfed import assembly, clients, events, storage
from emberfed.clients import Budget, Client
from emberfed.config import RunConfig
from emberfed.errors import ClientError, ConfigError, EmberfedError, RunFolderError, closest, one_of
from emberfed.flower.answers import LastAnswers
from emberfed.flower.wire import Asked, Description, Hello, answered, read_asked
from emberfed.handshake import CLASSES, described, differences
from emberfed.material import ClientsHere
from emberfed.models.foundation_model import FoundationModel
from emberfed.own_data import OwnData, own_shards
from emberfed.records import ClientFailed, Json, Question, Reply
from emberfed.seeds import Seeds
from emberfed.training import check_possible
from emberfed.worker import Worker


@final
@dataclass(frozen=True, slots=True)
class ClientSettings:
    """What a client is told by whoever starts it.

    Attributes:
        name: Its id: that of its key at the server.
        tier: The name of its tier.
        data: Its data.
        state: Where it keeps its memories, by run.
    """

    name: str
    tier: str
    data: Path
    state: Path


@final
@dataclass(frozen=True, slots=True, eq=False)
class _Ready:
    """Model and data, loaded for a federation whose server told its classes."""

    model: FoundationModel
    processor: Any
    classes: tuple[str, ...]
    own: OwnData
    told: Mapping[str, Json]


@final
class Desk:
    """Answers one message after the other."""

    def __init__(
        self, config: RunConfig, settings: ClientSettings, listen: Callable[[events.Event], None] = events.ignore
    ) -> None:
        """Take what was configured; model and data are loaded when a server first asks. Raises: ConfigError."""
        tiers = [tier.name for tier in config.clients.tiers]
        if settings.tier not in tiers:
            raise ConfigError(
                f"tier {settings.tier!r} is not one of clients.tiers{closest(settings.tier, tiers)} (there are "
                f"{one_of(tiers)})"
            )
        self._config = config
        self._settings = settings
        self._listen = listen
        self._ready: _Ready | None = None
        self._workers: dict[tuple[str, str], Worker] = {}
        self._last: tuple[Worker, Question] | None = None

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer; what goes wrong is told to the server as a value. Raises: StorageError."""
        message = read_asked(content)
        if isinstance(message, Hello):
            return answered(self._describe(message))
        reply = self._reply(message)
        if isinstance(reply, ClientFailed):
            self._listen(events.ClientDone(reply.round, reply.client, f"failed: {reply.reason}"))
        else:
            self._listen(events.ClientDone(reply.round, reply.client, None))
        return answered(reply)

    def rest(self) -> None:
        """Do what the method does while the server goes on. Raises: StorageError."""
        if self._last is not None:
            worker, question = self._last
            self._last = None
            worker.idle(question)

    def prepare(self) -> None:
        """Look at data and model now, so that what is wrong with them shows before a server is there.

        They are loaded when it is: it knows the classes.

        Raises: EmberfedError.
        """
        self._config.task.own_records(self._config.data, self._settings.data, None)
        self._config.task.processor(self._config.model)

    def _describe(self, hello: Hello) -> Description:
        try:
            ready = self._checked(hello)
        except EmberfedError as error:
            self._listen(events.Notice("warning", f"the server was told that this client cannot take part: {error}"))
            return Description({"problem": str(error)})
        kept = 0 if ready.own.held_out is None else len(ready.own.held_out.examples)
        counts = {**ready.own.train.report.json(), "examples": len(ready.own.train.examples), "kept_apart": kept}
        told = {"own": dict(ready.told), "client": self._settings.name, "tier": self._settings.tier, "counts": counts}
        return Description(told)

    def _reply(self, message: Asked) -> Reply | ClientFailed:
        question = message.question
        try:
            worker = self._worker(message)
        except EmberfedError as error:
            return ClientFailed(question.round, question.client, str(error))
        given = LastAnswers(self._folder(message.hello) / "answers")
        self._last = None
        reply: Reply | ClientFailed | None = given.find(question, message.tier)
        if reply is None:
            reply = worker.answer(question)
            if isinstance(reply, Reply):
                given.keep(question, message.tier, reply)
        self._last = worker, question
        return reply

    def _worker(self, message: Asked) -> Worker:
        """Return who answers for this client in a run. Raises: EmberfedError if it cannot take part in it."""
        ready = self._checked(message.hello)
        if message.question.client != self._settings.name:
            raise ClientError(f"asked as {message.question.client!r}, but this client is {self._settings.name!r}")
        key = message.hello.run, message.tier
        if key not in self._workers:
            self._workers[key] = self._hired(ready, message)
        return self._workers[key]

    def _hired(self, ready: _Ready, message: Asked) -> Worker:
        config, name = self._config, self._settings.name
        folder = self._folder(message.hello)
        self._check_same_data(folder / "data.json", ready.own)
        budgets = clients.resolve(config.clients.tiers, ready.model.native_top_k, ready.model.largest_top_k)
        budget = _named(budgets, message.tier)
        own = ready.own
        here = ClientsHere(
            model=ready.model,
            processor=ready.processor,
            clients=(Client(name, budget, len(own.train.examples)),),
            shards={name: own.train},
            held_out={} if own.held_out is None else {name: own.held_out},
        )
        return assembly.worker(config, folder, here, self._listen)

    def _folder(self, hello: Hello) -> Path:
        """Return where the client keeps what is of one run. Raises: ClientError."""
        return self._settings.state / _safe(hello.run)

    def _check_same_data(self, file: Path, own: OwnData) -> None:
        """Check that the data is what it was when this client first took part in the run. Raises: ClientError."""
        digests = [own.train.digest(), *([] if own.held_out is None else [own.held_out.digest()])]
        if not file.exists():
            storage.write_json(file, digests)
            return
        try:
            known = json.loads(file.read_bytes())
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file} cannot be read ({error}); put it back") from None
        if known != digests:
            raise ClientError(
                f"the data in {self._settings.data} is not what it was when this client joined the run; put it back, "
                f"or begin a new run"
            )

    def _checked(self, hello: Hello) -> _Ready:
        """Return model and data if they are what the server expects. Raises: EmberfedError naming what differs."""
        classes = hello.expected.get(CLASSES)
        ready = self._loaded(tuple(str(name) for name in classes) if isinstance(classes, list) else ())
        found = differences(hello.expected, ready.told)
        if found:
            raise ClientError("; ".join(found))
        return ready

    def _loaded(self, classes: tuple[str, ...]) -> _Ready:
        if self._ready is None or self._ready.classes != classes:
            config, task = self._config, self._config.task
            processor = task.processor(config.model)
            seeds = Seeds(config.seed)
            own = own_shards(task, config.data, self._settings.data, processor, classes, self._settings.name, seeds)
            self._ready = None
            self._workers.clear()
            model = task.model(config.model, processor, classes)
            check_possible(model, config.training)
            assembly.check_length(model, config)
            told = described(config, model, processor, classes, assembly.method(config))
            self._ready = _Ready(model, processor, classes, own, told)
        return self._ready


def _named(budgets: list[Budget], tier: str) -> Budget:
    """Return the budget of a tier. Raises: ClientError."""
    for budget in budgets:
        if budget.tier == tier:
            return budget
    raise ClientError(f"asked to train as tier {tier!r}, which this client's configuration does not have")


def _safe(run: str) -> str:
    """Return a run's identity as the name of a folder. Raises: ClientError if it is none."""
    if not (run.isalnum() and run.isascii() and len(run) <= 64):
        raise ClientError("the server's name for its run is not one of emberfed's")
    return run
