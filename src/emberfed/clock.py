"""The clients' clock: seconds that counted work would take on a device, so that every run tells the same.

    work      FLOP / rate + memory traffic / bandwidth + bytes read from disk / rate
    client    download / rate + work + upload / rate
    round     max(max_c client_c + server, max_c (client_c + idle_c))

A client's parts follow each other: where compute hides memory traffic (the roofline of Williams et al., CACM 2009),
the largest errors against measured times are larger (`benchmarks/clock.py`). Idle work is what a client does while the
server aggregates. Rounds are synchronous: the server waits for the slowest client, or for the deadline if somebody
missed it. Evaluation is not on the clock: it is the experimenter's. A client that fails or is refused for another
reason is taken to say so before the others are done.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self, final

from pydantic import Field, model_validator

from emberfed.devices import Device
from emberfed.metrics import Aim, aimed_at, headline_in
from emberfed.records import Json
from emberfed.sections import Section

WORK: Final = ("flops", "memory_traffic_bytes", "disk_bytes", "idle_flops", "idle_memory_traffic_bytes")
"""Keys of an upload's `stats` that the clock reads; all but the first may be missing, and are then 0."""

TIME_TO_ACCURACY: Final = "time_to_accuracy"
"""Event of the line in `metrics.jsonl` that says when a target was reached first."""


_ALLOWED: Final[Mapping[Aim, tuple[float, str]]] = {
    "headline": (1.0, "above 0 and be 1 at most"),
    "loss": (math.inf, "above 0"),
}
"""The largest target, and where targets lie in words."""


class ServerClock(Section):
    """What the server takes of a round.

    Attributes:
        memory_bytes_per_second: Bytes of uploads that it aggregates per second. An assumption: about what a server with
            eight channels of DDR4 reaches while it reads and adds.
    """

    memory_bytes_per_second: float = Field(1e11, ge=1)


class ClockConfig(Section):
    """Time on the clients' devices, counted and not measured; it runs if every tier has a `device`.

    Attributes:
        deadline_seconds: A client that takes longer is refused, and the round lasts as long; null: none.
        metric: What `targets` are values of, and what is drawn over time: headline (ROUGE-L or accuracy), or the loss
            that is evaluated with it, in nats, for which lower is better.
        targets: Values of that metric; the first time each is reached stands in `metrics.jsonl`. Above 0; those of the
            headline are 1 at most.
        server: What the server takes.
    """

    deadline_seconds: float | None = Field(None, gt=0)
    metric: Aim = "headline"
    targets: list[float] = Field(default_factory=list)
    server: ServerClock = ServerClock()

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        most, told = _ALLOWED[self.metric]
        wrong = [target for target in self.targets if not 0 < target <= most]
        if wrong:
            raise ValueError(f"targets must lie {told}, found {wrong[0]:g} (values of clock.metric: {self.metric})")
        if len(set(self.targets)) < len(self.targets):
            raise ValueError(f"targets must differ, found {self.targets}")
        return self


@final
@dataclass(frozen=True, slots=True)
class Effort:
    """Counted work.

    Attributes:
        flops: Of matrix products.
        memory_traffic_bytes: Read from and written to the memory that weights are in.
        disk_bytes: Read from disk.
    """

    flops: float = 0.0
    memory_traffic_bytes: float = 0.0
    disk_bytes: float = 0.0


@final
@dataclass(frozen=True, slots=True)
class ClientTime:
    """A client's part of a round.

    Attributes:
        busy_seconds: Download, work and upload.
        idle_seconds: Work after the upload, while the server goes on.
    """

    busy_seconds: float
    idle_seconds: float = 0.0


def work_seconds(device: Device, effort: Effort) -> float:
    """Return how long a device works."""
    compute = effort.flops / device.flops_per_second
    memory = effort.memory_traffic_bytes / device.memory_bytes_per_second
    return compute + memory + effort.disk_bytes / device.disk_bytes_per_second


def client_seconds(device: Device, effort: Effort, bytes_down: int, bytes_up: int) -> float:
    """Return how long a client takes from the beginning of its download to the end of its upload."""
    network = bytes_down / device.download_bytes_per_second + bytes_up / device.upload_bytes_per_second
    return network + work_seconds(device, effort)


def client_time(device: Device, stats: Mapping[str, Any], bytes_down: int, bytes_up: int) -> ClientTime:
    """Return a client's part of a round from the counted work in its upload's `stats`."""
    flops, traffic, disk, idle_flops, idle_traffic = (stats.get(key, 0) for key in WORK)
    busy = client_seconds(device, Effort(flops, traffic, disk), bytes_down, bytes_up)
    return ClientTime(busy, work_seconds(device, Effort(idle_flops, idle_traffic)))


def round_seconds(clients: Iterable[ClientTime], server_seconds: float, missed_deadline: float | None = None) -> float:
    """Return how long a round takes.

    Args:
        clients: The parts of those that were in time.
        server_seconds: From the last upload to the next round.
        missed_deadline: The deadline if somebody missed it, else None.
    """
    parts = list(clients)
    waited = max((part.busy_seconds for part in parts), default=0.0) if missed_deadline is None else missed_deadline
    return max([waited + server_seconds, *(part.busy_seconds + part.idle_seconds for part in parts)])


def server_seconds(config: ServerClock, bytes_up: int) -> float:
    """Return how long the server aggregates uploads of so many bytes in all."""
    return bytes_up / config.memory_bytes_per_second


def lateness(config: ClockConfig, busy_seconds: float) -> str | None:
    """Return why a client that took so long is refused, or None if it was in time."""
    deadline = config.deadline_seconds
    if deadline is None or busy_seconds <= deadline:
        return None
    return f"missed the deadline: {busy_seconds:.4g} s on its device, clock.deadline_seconds is {deadline:g}"


def elapsed(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the seconds at the end of the newest of these lines of `metrics.jsonl`; 0 without any."""
    return max((float(line["clock_total_seconds"]) for line in lines if "clock_total_seconds" in line), default=0.0)


def newly_reached(
    config: ClockConfig, evaluations: Iterable[Mapping[str, Any]], before: Iterable[Mapping[str, Any]]
) -> list[dict[str, Json]]:
    """Return a line for `metrics.jsonl` for each tier and target that these evaluations reach and none before did.

    Args:
        config: The targets, and the metric that they are values of.
        evaluations: The round's lines, with `clock_seconds`. A loss that was not finite is null in them: it reaches
            nothing.
        before: All lines of earlier rounds.
    """
    known = {(line["tier"], line["target"]) for line in before if line["event"] == TIME_TO_ACCURACY}
    return [
        {
            "round": line["round"],
            "event": TIME_TO_ACCURACY,
            "tier": line["tier"],
            "metric": metric.key,
            "target": target,
            "clock_seconds": line["clock_seconds"],
        }
        for line in evaluations
        if line["event"] == "evaluation"
        for metric in [aimed_at(headline_in(line), config.metric)]
        if line[metric.key] is not None
        for target in metric.easiest_first(config.targets)
        if (line["tier"], target) not in known and metric.reached(line[metric.key], target)
    ]
