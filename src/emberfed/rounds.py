"""The main loop. Everything a round is, in the order of time."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from emberfed import clients, clock, costs, events, personal
from emberfed.checkpoint import RunFolder
from emberfed.clients import Budget, Client, ClientsConfig
from emberfed.clock import ClockConfig
from emberfed.data.shard import Shard
from emberfed.engine import Engine, IdleTime
from emberfed.evaluation import EvaluationConfig
from emberfed.inbox import Inbox
from emberfed.method import Method
from emberfed.models.foundation_model import FoundationModel
from emberfed.records import Bundle, Json
from emberfed.seeds import Seeds
from emberfed.surveys import Surveys
from emberfed.tasks import Task

_Lines = list[dict[str, Json]]
_OVERFLOW = "the model overflows: lower training.learning_rate, or use model.dtype bfloat16 or float32"


@final
@dataclass(frozen=True, slots=True, eq=False)
class Federation:
    """All that the loop works with; `assembly.federate` makes one.

    Attributes:
        task: What the model is trained to do.
        processor: What made its inputs of records.
        budgets: Those of all tiers.
        evaluated: Those that the global model is evaluated at.
        personal: Whether clients keep examples for evaluating their own models.
        timing: The clock's settings if every tier has a device; None: there is no clock.
    """

    rounds: int
    seeds: Seeds
    method: Method
    engine: Engine
    model: FoundationModel
    task: Task
    processor: Any
    clients: tuple[Client, ...]
    participation: ClientsConfig
    budgets: tuple[Budget, ...]
    evaluated: tuple[Budget, ...]
    test: Shard
    personal: bool
    evaluation: EvaluationConfig
    keep_uploads: bool
    timing: ClockConfig | None = None


def run(federation: Federation, folder: RunFolder, listen: events.Listener = events.ignore) -> Bundle:
    """Run the rounds that `folder` does not hold yet and return the last state.

    Raises:
        RoundFailed: if too few clients gave a usable upload. StorageError: if the disk is full. The run stays
            resumable after either, and after a kill at any moment: the same bits come out.
    """
    method, model = federation.method, federation.model
    done, state = _start(federation, folder, listen)
    for round in range(done + 1, federation.rounds + 1):
        started = time.perf_counter()
        cohort = clients.cohort(federation.clients, federation.participation, round, federation.seeds)
        inbox = Inbox(round, cohort, folder.partial(round), _logged(folder, listen), federation.timing)
        resumed_seconds = _seconds(inbox.records)
        listen(events.RoundStarted(round, federation.rounds, len(inbox.waiting)))
        state = _assigned(federation, state, inbox, round)
        asking = time.perf_counter()
        for reply in federation.engine.map(inbox.jobs(method, state)):
            inbox.receive(reply)
        asked_seconds = resumed_seconds + time.perf_counter() - asking
        uploads = inbox.close(federation.participation.min_replies)
        state = method.aggregate(state, uploads)
        evaluating = time.perf_counter()
        evaluations = _evaluate(federation, state, round, _logged(folder, listen)) if _due(federation, round) else []
        evaluated_seconds = time.perf_counter() - evaluating
        exported = method.export(state, model)
        seconds = time.perf_counter() - started + resumed_seconds
        phases = _Phases(seconds, asked_seconds, evaluated_seconds)
        summary = _summary(round, inbox, evaluations, phases, federation.engine.take_idle())
        if federation.timing is not None:
            evaluations, summary = _on_clock(federation.timing, folder, inbox, evaluations, summary)
        folder.commit(round, state, exported, [*evaluations, summary], inbox.records)
        if not federation.keep_uploads:
            folder.drop_uploads(round)
        listen(events.RoundDone(round, _quality(federation, evaluations), summary["seconds"]))
    folder.finish(max(done, federation.rounds))
    return state


def _on_clock(
    timing: ClockConfig, folder: RunFolder, inbox: Inbox, evaluations: _Lines, summary: dict[str, Json]
) -> tuple[_Lines, dict[str, Json]]:
    """Return a round's lines with their seconds on the clock, and those of targets that it is the first to reach."""
    before, spent = folder.metrics(), inbox.clock_seconds()
    now = clock.elapsed(before) + spent
    timed = [{**line, "clock_seconds": now} for line in evaluations]
    reached = clock.newly_reached(timing, timed, before)
    return [*timed, *reached], {**summary, "clock_seconds": spent, "clock_total_seconds": now}


def _assigned(federation: Federation, state: Bundle, inbox: Inbox, round: int) -> Bundle:
    """Ask clients for surveys where the method wants any, and let it decide who does what in this round."""
    method = federation.method
    surveys = Surveys(method.unsurveyed(state, inbox.cohort), method.survey_expects(state), round)
    for reply in federation.engine.map(surveys.questions()):
        surveys.receive(reply)
    for client, reason in sorted(surveys.failed.items()):
        inbox.excuse(client, reason)
    return method.assign(state, inbox.cohort, surveys.payloads(), round)


def _evaluate(federation: Federation, state: Bundle, round: int, listen: events.Listener) -> list[dict[str, Json]]:
    """Evaluate the global model, and each client's own where clients have data for it."""
    tiers = evaluate_tiers(federation, state, round, listen)
    return [*tiers, *evaluate_clients(federation, state, round, listen)] if federation.personal else tiers


def evaluate_clients(
    federation: Federation, state: Bundle, round: int, listen: events.Listener = events.ignore
) -> list[dict[str, Json]]:
    """Let every client evaluate its own model, as it stands after `round`; lines for metrics.jsonl.

    A client that fails is left out, and told of; so is one whose answer cannot be used.
    """
    answers = personal.Answers(federation.clients, federation.task.metric, round, listen)
    for reply in federation.engine.map(answers.jobs(federation.method, state)):
        answers.receive(reply)
    return answers.lines()


def evaluate_tiers(
    federation: Federation, state: Bundle, round: int, listen: events.Listener = events.ignore
) -> list[dict[str, Json]]:
    """Evaluate the global model as each budget would run it; one line for metrics.jsonl per budget."""
    lines: list[dict[str, Json]] = []
    for budget in federation.evaluated:
        started = time.perf_counter()

        def progress(done: int, total: int, tier: str = budget.tier) -> None:
            listen(events.EvaluationProgress(round, tier, done, total))

        with (
            costs.measuring(federation.model.device) as peak,
            federation.method.deploy(state, federation.model, budget) as model,
        ):
            scores = federation.task.evaluate(
                model, federation.processor, federation.test, federation.evaluation, progress
            )
        if not math.isfinite(scores.overall.loss):
            listen(
                events.Notice("warning", f"round {round}: the loss of tier {budget.tier!r} is not finite; {_OVERFLOW}")
            )
        lines.append(
            {
                "round": round,
                "event": "evaluation",
                "tier": budget.tier,
                "top_k": budget.top_k,
                **({} if budget.adapter_top_k is None else {"adapter_top_k": budget.adapter_top_k}),
                **scores.json(),
                "seconds": time.perf_counter() - started,
                "peak_memory_bytes": peak.bytes,
            }
        )
    return lines


def _start(federation: Federation, folder: RunFolder, listen: events.Listener) -> tuple[int, Bundle]:
    """Return the newest whole round and its state; round 0 is the state before training, evaluated."""
    found = folder.latest()
    if found is not None:
        done, state, problems = found
        # A model the state does not fit is told here, in one line, and not by every client.
        with federation.method.deploy(state, federation.model, federation.budgets[0]):
            pass
        for problem in problems:
            _logged(folder, listen)(events.Notice("warning", f"{problem}; going on from round {done}"))
        return done, state
    listen(events.RoundStarted(0, federation.rounds, 0))
    started = time.perf_counter()
    state = federation.method.init(federation.model, federation.budgets, federation.seeds.at(purpose="init"))
    evaluations = _evaluate(federation, state, 0, _logged(folder, listen))
    if federation.timing is not None:
        evaluations = [{**line, "clock_seconds": 0.0} for line in evaluations]
        evaluations += clock.newly_reached(federation.timing, evaluations, [])
    folder.commit(0, state, federation.method.export(state, federation.model), evaluations, [])
    listen(events.RoundDone(0, _quality(federation, evaluations), time.perf_counter() - started))
    return 0, state


def _due(federation: Federation, round: int) -> bool:
    every = federation.evaluation.every
    return round == federation.rounds or (every > 0 and round % every == 0)


def _logged(folder: RunFolder, listen: events.Listener) -> events.Listener:
    """Pass events on, and keep those that tell of trouble in events.jsonl."""

    def hear(event: events.Event) -> None:
        if isinstance(event, events.Notice):
            folder.log(event.level, event.message)
        if isinstance(event, events.ClientDone) and event.problem is not None:
            folder.log("warning", f"round {event.round}: client {event.client} {event.problem}")
        listen(event)

    return hear


@final
@dataclass(frozen=True, slots=True)
class _Phases:
    """How long a round took, and how long two of its phases, by the server's clock."""

    seconds: float
    asked_seconds: float
    evaluated_seconds: float


def _summary(
    round: int, inbox: Inbox, evaluations: Sequence[Mapping[str, Any]], phases: _Phases, idle: IdleTime
) -> dict[str, Json]:
    """Return the round's line for metrics.jsonl: counted work and bytes, measured seconds and memory.

    Training and evaluation are sums over clients and tiers; where clients work at the same time, a phase is shorter.

    Idle time is what clients did since the round before, and how much of it this round had to wait for.
    """
    records = inbox.records
    training, evaluation = _seconds(records), _seconds([line for line in evaluations if "seconds" in line])
    examples = sum(record["examples"] for record in records)
    touched: set[tuple[int, int]] = set()
    experts = 0
    for record in records:
        for layer, counts in enumerate(record["activation_counts"] or []):
            touched.update((layer, expert) for expert, count in enumerate(counts) if count)
        experts = max(experts, sum(len(counts) for counts in record["activation_counts"] or []))
    return {
        "round": round,
        "event": "round",
        "seconds": phases.seconds,
        "training_seconds": training,
        "evaluation_seconds": evaluation,
        "overhead_seconds": phases.seconds
        - min(training, phases.asked_seconds)
        - min(evaluation, phases.evaluated_seconds),
        **(
            {"idle_seconds": idle.work_seconds, "idle_waited_seconds": idle.waited_seconds} if idle.work_seconds else {}
        ),
        "bytes_down": sum(record["bytes_down"] for record in records),
        "bytes_up": sum(record["bytes_up"] for record in records),
        "flops": sum(record["flops"] for record in records),
        "peak_memory_bytes": max(
            line["peak_memory_bytes"] for line in [*records, *evaluations] if "peak_memory_bytes" in line
        ),
        "train_loss": math.fsum(record["loss_mean"] * record["examples"] for record in records) / examples,
        "replied": [record["client"] for record in records],
        "failed": dict(sorted(inbox.failed.items())),
        "refused": dict(sorted(inbox.refused.items())),
        "share_of_experts_trained": len(touched) / experts if experts else None,
    }


def _seconds(lines: Sequence[Mapping[str, Any]]) -> float:
    return math.fsum(line["seconds"] for line in lines)


def _quality(federation: Federation, evaluations: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    key = federation.task.metric.key
    return {line["tier"]: line[key] for line in evaluations if line["event"] == "evaluation"}
