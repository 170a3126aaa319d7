"""`emberfed doctor --measure`: which tier this machine can afford."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import psutil
import torch
from rich.console import RenderableType
from rich.text import Text

from emberfed import assembly, clients, own_data
from emberfed.cli import plan as planning
from emberfed.cli import tables
from emberfed.cli.doctor import Check
from emberfed.cli.tables import plain_table
from emberfed.clients import Budget, Client
from emberfed.config import RunConfig
from emberfed.devices import Device
from emberfed.errors import DataError, EmberfedError
from emberfed.material import ClientsHere
from emberfed.report import numbers
from emberfed.seeds import Seeds
from emberfed.tier_choice import Choice, Need, choose

_CLIENT = "this client"


@final
@dataclass(frozen=True, slots=True)
class Afforded:
    """The tiers, what each needs, and which this machine can afford.

    Attributes:
        needs: Of each tier, all counted with the same data.
        free_memory_bytes: Before the model was loaded.
        choice: What was chosen.
    """

    needs: tuple[Need, ...]
    free_memory_bytes: int
    choice: Choice

    def json(self) -> dict[str, Any]:
        """Return it as plain values."""
        tiers = [
            {
                "tier": need.tier,
                "memory_bytes": need.memory_bytes,
                "round_flops": need.round_flops,
                "problems": list(self.choice.problems[need.tier]),
            }
            for need in self.needs
        ]
        return {"tier": self.choice.tier, "free_memory_bytes": self.free_memory_bytes, "tiers": tiers}

    def tables(self) -> list[RenderableType]:
        """Return what there is to see."""
        table = plain_table("Tiers, each counted with the same data")
        for name in ("Tier", "Memory", "FLOP per round"):
            table.add_column(name, justify="left" if name == "Tier" else "right", no_wrap=True)
        table.add_column("Here")
        for need in self.needs:
            problems = "; ".join(self.choice.problems[need.tier])
            fits = "the largest that fits" if need.tier == self.choice.tier else "fits"
            sizes = numbers.byte_size(need.memory_bytes), numbers.flops(need.round_flops)
            table.add_row(need.tier, *sizes, Text(problems or fits, style="yellow" if problems else ""))
        free = numbers.byte_size(self.free_memory_bytes)
        return [table, Text(f"{free} of memory is free now; a limit that a container sets is not seen.")]


@final
@dataclass(frozen=True, slots=True)
class Measured:
    """This machine, and what it can afford.

    Attributes:
        device: How fast it is.
        afforded: The tiers; if they could not be counted, why.
    """

    device: Device
    afforded: Afforded | str

    def json(self) -> dict[str, Any]:
        """Return it as plain values."""
        tiers = None if isinstance(self.afforded, str) else self.afforded.json()
        return {"device": self.device.model_dump(mode="json"), "afforded": tiers}

    def check(self) -> Check:
        """Return the outcome as a check of this machine."""
        if isinstance(self.afforded, str):
            return Check("tier", "warning", f"what tiers need cannot be counted here: {self.afforded}")
        if self.afforded.choice.tier is None:
            return Check("tier", "warning", "this machine can afford none of clients.tiers; why is said below")
        return Check("tier", "ok", f"this machine can afford --tier {self.afforded.choice.tier}")

    def tables(self) -> list[RenderableType]:
        """Return what there is to see."""
        return [tables.device(self.device), *([] if isinstance(self.afforded, str) else self.afforded.tables())]


def free_memory_bytes(config: RunConfig) -> int:
    """Return what is free of the memory that the model would be in; the libraries are loaded and have theirs."""
    if config.model.device != "cpu" and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)


def measured(config: RunConfig, data: Path | None, machine: Device, free_bytes: int) -> Measured:
    """As `afforded`, but what goes wrong is told, not raised."""
    try:
        return Measured(machine, afforded(config, data, machine, free_bytes))
    except EmberfedError as error:
        return Measured(machine, str(error))


def afforded(config: RunConfig, data: Path | None, machine: Device, free_bytes: int) -> Afforded:
    """Count every tier with the same data, and choose.

    Args:
        config: The configuration.
        data: This client's own data; None: that of all clients of a run on one machine.
        machine: This machine, as measured.
        free_bytes: What `free_memory_bytes` returned before any model was loaded.

    Raises: EmberfedError if model or data cannot be used.
    """
    here, budgets = _everybody(config) if data is None else _alone(config, data)
    everywhere = tuple(replace(client, budget=budget) for budget in budgets for client in here.clients)
    plans = planning.counted(config, replace(here, clients=everywhere), budgets)
    needs = tuple(
        Need(plan.tier, plan.memory.total_bytes, plan.round_flops, plan.disk_bytes, budget.device)
        for plan, budget in zip(plans, budgets, strict=True)
    )
    return Afforded(needs, free_bytes, choose(needs, free_bytes, machine))


def _everybody(config: RunConfig) -> tuple[ClientsHere, tuple[Budget, ...]]:
    try:
        material = assembly.gather(config)
    except DataError as error:
        raise DataError(f"{error} (or count with this client's own data: --data PATH)") from None
    return material.here, material.budgets


def _alone(config: RunConfig, data: Path) -> tuple[ClientsHere, tuple[Budget, ...]]:
    """Return one client with data of its own; its classes, where the task has any, stand for everybody's."""
    task = config.task
    processor = task.processor(config.model)
    labelled = config.data.task != "generation"
    classes = tuple(sorted(set(task.own_records(config.data, data, None)["category"]))) if labelled else ()
    own = own_data.own_shards(task, config.data, data, processor, classes, _CLIENT, Seeds(config.seed))
    model = task.model(config.model, processor, classes)
    budgets = tuple(clients.resolve(config.clients.tiers, model.native_top_k, model.largest_top_k))
    client = Client(_CLIENT, budgets[0], len(own.train.examples))
    held_out = {} if own.held_out is None else {_CLIENT: own.held_out}
    return ClientsHere(model, processor, (client,), {_CLIENT: own.train}, held_out), budgets
