"""Who takes part: tiers (named budgets), the clients on them, and each round's cohort."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Self, final

from pydantic import BeforeValidator, Field, model_validator

from emberfed.devices import Device, named
from emberfed.errors import ConfigError, one_of
from emberfed.sections import Section
from emberfed.seeds import Seeds


class Tier(Section):
    """A named budget and the share of clients that have it.

    Attributes:
        name: Its name in tables and reports.
        share: Share of the clients, in (0, 1]; the shares of all tiers sum to 1.
        top_k: Experts activated per token.
        beta: Instead of `top_k`: K = floor(K_max * beta), at least 1, K_max the checkpoint's own K (A3SMoE).
        rank: LoRA rank, for methods that vary it.
        adapter_top_k: Experts of a sparse adapter activated per token, for methods that have one. A tier with it may
            leave out `top_k` and `beta`, and then has the checkpoint's own K (1 in a dense model).
        tuned_experts: Experts it can train, over all layers, for methods that choose them.
        held_experts: Experts its memory has room for, over all layers, those it trains and those merged from several
            included. A tier with it may leave out `top_k` and `beta` too.
        device: What its clients compute on, for the clock: the name of a known device, or all rates of another one
            under a name of its own.
    """

    name: str = Field(pattern=r"^[\w.=-]+$")
    share: float = Field(gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    beta: float | None = Field(None, gt=0, le=1)
    rank: int | None = Field(None, ge=1)
    adapter_top_k: int | None = Field(None, ge=1)
    tuned_experts: int | None = Field(None, ge=1)
    held_experts: int | None = Field(None, ge=1)
    device: Annotated[Device | None, BeforeValidator(named)] = None

    @model_validator(mode="after")
    def _one_of_top_k_and_beta(self) -> Self:
        neither = self.top_k is None and self.beta is None
        limited_otherwise = self.adapter_top_k is not None or self.held_experts is not None
        if (self.top_k is None) == (self.beta is None) and not (neither and limited_otherwise):
            raise ValueError(
                f"tier {self.name!r} needs exactly one of top_k and beta (or adapter_top_k, where the method has an "
                f"adapter beside the FFN, or held_experts, where it chooses the experts that a client holds)"
            )
        return self

    @model_validator(mode="after")
    def _holds_what_it_tunes(self) -> Self:
        if self.tuned_experts is not None and self.held_experts is not None and self.tuned_experts > self.held_experts:
            raise ValueError(
                f"tier {self.name!r} tunes {self.tuned_experts} experts and holds {self.held_experts}; held_experts "
                f"counts those it tunes too, so tuned_experts may be {self.held_experts} at most"
            )
        return self


class ClientsConfig(Section):
    """The clients and how they take part.

    Attributes:
        count: Number of clients.
        tiers: Their budgets.
        fraction: Share of the clients asked in each round (rounded up).
        per_round: Instead of `fraction`: how many are asked in each round.
        min_replies: Fewer usable uploads than this fail the round.
    """

    count: int = Field(ge=1)
    tiers: list[Tier] = Field(min_length=1)
    fraction: float = Field(1.0, gt=0, le=1)
    per_round: int | None = Field(None, ge=1)
    min_replies: int = Field(1, ge=1)

    @property
    def asked(self) -> int:
        """Clients asked in each round."""
        return self.per_round if self.per_round is not None else math.ceil(self.count * self.fraction - 1e-9)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        total = math.fsum(tier.share for tier in self.tiers)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"the tiers' shares must sum to 1, they sum to {total:.8g}")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"tier names must differ, found {names}")
        timed = [tier.name for tier in self.tiers if tier.device is not None]
        if timed and len(timed) < len(names):
            raise ValueError(
                f"either all tiers have a device, or none; {one_of(sorted(set(names) - set(timed)))} have none"
            )
        if self.per_round is not None and self.fraction != 1.0:
            raise ValueError("give fraction or per_round, not both")
        if self.asked > self.count:
            raise ValueError(f"per_round {self.per_round} is more than the {self.count} clients there are")
        if self.min_replies > self.asked:
            raise ValueError(f"min_replies {self.min_replies} is more than the {self.asked} clients asked in a round")
        return self


@final
@dataclass(frozen=True, slots=True)
class Budget:
    """What a device can afford.

    Attributes:
        tier: The tier's name.
        top_k: Active experts per token.
        rank: LoRA rank, if the tier gives one.
        adapter_top_k: Active experts of a sparse adapter per token, if the tier gives them.
        tuned_experts: Experts it can train, over all layers, if the tier gives them.
        held_experts: Experts its memory has room for, over all layers, trained ones included, if the tier gives them.
        device: What it computes on, for the clock, if the tier says so.
    """

    tier: str
    top_k: int
    rank: int | None = None
    adapter_top_k: int | None = None
    tuned_experts: int | None = None
    held_experts: int | None = None
    device: Device | None = None


@final
@dataclass(frozen=True, slots=True)
class Client:
    """A client as the server knows it: id, budget, number of training examples."""

    id: str
    budget: Budget
    examples: int


def client_ids(count: int) -> list[str]:
    """Return the ids `c0`, `c1`, ..., padded with zeros so that they sort by number."""
    width = len(str(count - 1))
    return [f"c{number:0{width}d}" for number in range(count)]


def resolve(tiers: Sequence[Tier], native_top_k: int, largest_top_k: int) -> list[Budget]:
    """Return each tier's budget on a model. Raises: ConfigError if a K is larger than the model allows."""
    budgets = []
    for tier in tiers:
        beta = 1.0 if tier.beta is None else tier.beta
        top_k = tier.top_k if tier.top_k is not None else max(1, math.floor(native_top_k * beta + 1e-9))
        if top_k > largest_top_k:
            limit = (
                f"send a token to {largest_top_k} experts at most; choose 1 to {largest_top_k}"
                if largest_top_k > 1
                else "activate one only, as dense models do; set top_k: 1, or give beta"
            )
            raise ConfigError(f"clients.tiers: tier {tier.name!r} has top_k {top_k}, the model can {limit}")
        limits = (tier.rank, tier.adapter_top_k, tier.tuned_experts, tier.held_experts)
        budgets.append(Budget(tier.name, top_k, *limits, tier.device))
    return budgets


def enrol(
    examples: Mapping[str, int], config: ClientsConfig, native_top_k: int, largest_top_k: int, seeds: Seeds
) -> tuple[Client, ...]:
    """Return the clients, sorted by id, each on a tier.

    The tiers' shares are turned into whole clients by largest remainder; who gets which is a seeded permutation.

    Args:
        examples: Training examples by client id.
        config: The `clients` section.
        native_top_k: K of the checkpoint.
        largest_top_k: The most experts the model can send a token to.
        seeds: The run's seeds.

    Raises: ConfigError if a tier would get no client, or K does not fit the model.
    """
    budgets = resolve(config.tiers, native_top_k, largest_top_k)
    counts = largest_remainder([tier.share for tier in config.tiers], len(examples))
    for tier, count in zip(config.tiers, counts, strict=True):
        if count == 0:
            raise ConfigError(
                f"clients.tiers: tier {tier.name!r} with share {tier.share:g} gets none of the {len(examples)} "
                f"clients; raise its share or clients.count"
            )
    drawn = [budget for budget, count in zip(budgets, counts, strict=True) for _ in range(count)]
    order = seeds.numpy("tiers").permutation(len(drawn))
    ids = sorted(examples)
    return tuple(Client(id_, drawn[place], examples[id_]) for id_, place in zip(ids, order, strict=True))


def largest_remainder(shares: Sequence[float], total: int) -> list[int]:
    """Divide `total` by shares that sum to 1: floors first, what is left to the largest remainders (earlier first)."""
    exact = [share * total for share in shares]
    counts = [math.floor(value + 1e-9) for value in exact]
    # Rounded, or noise in the last digit would decide between equal remainders.
    by_remainder = sorted(range(len(shares)), key=lambda index: (round(counts[index] - exact[index], 9), index))
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    return counts


def cohort(clients: Sequence[Client], config: ClientsConfig, round: int, seeds: Seeds) -> tuple[Client, ...]:
    """Return the clients asked in `round`, sorted by id; everybody, or a sample without replacement."""
    if config.asked >= len(clients):
        return tuple(sorted(clients, key=lambda client: client.id))
    chosen = seeds.at(round=round).numpy("cohort").choice(len(clients), size=config.asked, replace=False)
    return tuple(sorted((clients[index] for index in chosen), key=lambda client: client.id))
