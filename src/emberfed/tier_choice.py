"""Which of a configuration's tiers a machine can afford: the largest whose needs it meets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

from emberfed.devices import Device
from emberfed.report import numbers


@final
@dataclass(frozen=True, slots=True)
class Need:
    """What a client of a tier must have.

    Attributes:
        tier: The tier's name.
        memory_bytes: At the peak of a training step.
        round_flops: Of a round; a tier with more is larger.
        disk_bytes: Of experts read in a round.
        device: What the tier's clients compute on; None if the configuration does not say.
    """

    tier: str
    memory_bytes: int
    round_flops: int
    disk_bytes: int
    device: Device | None


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen.

    Attributes:
        tier: The largest tier that fits; None if none does.
        problems: By tier, in the configuration's order, why it does not fit; nothing if it does.
    """

    tier: str | None
    problems: Mapping[str, tuple[str, ...]]


def choose(needs: Sequence[Need], free_memory_bytes: int, machine: Device) -> Choice:
    """Choose the tier whose round has the most FLOPs of those that fit; of equals, the first.

    A tier fits if its memory is free here and, where it has a device, that is not faster than this machine. Rates of
    the network are not compared: without a server they are not known.

    Args:
        needs: Of all tiers.
        free_memory_bytes: Of the memory that the model would be in, before it is loaded.
        machine: This machine, as measured.
    """
    problems = {need.tier: tuple(_problems(need, free_memory_bytes, machine)) for need in needs}
    fitting = [need for need in needs if not problems[need.tier]]
    chosen = max(fitting, key=lambda need: need.round_flops, default=None)
    return Choice(None if chosen is None else chosen.tier, problems)


def _problems(need: Need, free_memory_bytes: int, machine: Device) -> Iterator[str]:
    if need.memory_bytes > free_memory_bytes:
        yield f"needs {numbers.byte_size(need.memory_bytes)}, {numbers.byte_size(free_memory_bytes)} is free"
    if need.device is None:
        return
    for does, wanted, here, shown in _rates(need.device, machine, reads=need.disk_bytes > 0):
        if wanted > here:
            yield f"its device {need.device.name!r} {does} {shown(wanted)}/s, this machine {shown(here)}/s"


def _rates(device: Device, machine: Device, *, reads: bool) -> Iterator[tuple[str, float, float, Any]]:
    yield "computes", device.flops_per_second, machine.flops_per_second, numbers.flops
    yield "moves", device.memory_bytes_per_second, machine.memory_bytes_per_second, numbers.byte_size
    if reads:
        yield "reads", device.disk_bytes_per_second, machine.disk_bytes_per_second, numbers.byte_size
