"""Facts of the built-in world: what can be said of its people, how it is said, and how it is asked for.

A fact is drawn afresh for every document, so nobody's job or town can be learned by heart; it must be read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import numpy as np

from emberfed.builtin.words import (
    ANIMALS,
    COLOURS,
    DAYS,
    FOODS,
    GOODS,
    JOBS,
    MATERIALS,
    MONTHS,
    PEOPLE,
    PLACES,
    TOWNS,
    a,
    between,
    pick,
    plural,
    some,
)


@final
@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of fact: ways to state it, and (question, answer) pairs, all with the fact's fields in braces."""

    statements: tuple[str, ...]
    questions: tuple[tuple[tuple[str, ...], str], ...]


@final
@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that holds in a document; `fields` are the words that its frames are filled with."""

    kind: str
    fields: Mapping[str, str]

    def statement(self, rng: np.random.Generator) -> str:
        """Say the fact in one sentence."""
        return pick(rng, KINDS[self.kind].statements).format(**self.fields)

    def question(self, rng: np.random.Generator) -> tuple[str, str]:
        """Ask for part of the fact. Returns: question and answer; a question has one way to be answered."""
        wordings, answer = pick(rng, KINDS[self.kind].questions)
        return pick(rng, wordings).format(**self.fields), answer.format(**self.fields)


KINDS: Mapping[str, Kind] = MappingProxyType(
    {
        "job": Kind(
            (
                "{name} is {a_job} in {town}.",
                "{name} works as {a_job} in {town}.",
                "{name} lives in {town} and works as {a_job}.",
                "In {town} {name} found work as {a_job}.",
            ),
            (
                (
                    ("What is {name}'s job?", "What does {name} do for a living?", "Which job does {name} have?"),
                    "{name} works as {a_job}.",
                ),
                (("Where does {name} live?", "In which town does {name} work?"), "{name} lives in {town}."),
                (("Who is the {job}?", "Who works as {a_job}?"), "The {job} is {name}."),
            ),
        ),
        "age": Kind(
            ("{name} is {age} years old.", "{name} turned {age} in {month}.", "At {age}, {name} is still busy."),
            ((("How old is {name}?", "What is the age of {name}?"), "{name} is {age} years old."),),
        ),
        "pet": Kind(
            (
                "{name} keeps {a_colour} {animal}.",
                "{name} has {a_colour} {animal} at home.",
                "The {colour} {animal} belongs to {name}.",
            ),
            (
                (
                    ("Which animal does {name} have?", "What animal lives with {name}?"),
                    "{name} has {a_colour} {animal}.",
                ),
                (
                    ("Who owns the {animal}?", "To whom does the {colour} {animal} belong?"),
                    "The {colour} {animal} belongs to {name}.",
                ),
            ),
        ),
        "purchase": Kind(
            (
                "{name} bought {a_material} {item} for {price} coins.",
                "{name} paid {price} coins for {a_material} {item}.",
                "For {price} coins {name} got {a_material} {item}.",
            ),
            (
                (("What did {name} buy?", "Which thing did {name} pay for?"), "{name} bought {a_material} {item}."),
                (
                    ("How much did the {item} cost?", "What was the price of the {item}?"),
                    "The {item} cost {price} coins.",
                ),
                (("Who bought the {item}?", "Who paid for the {item}?"), "{name} bought the {item}."),
            ),
        ),
        "trip": Kind(
            (
                "On {day} {name} went to the {place}.",
                "{name} walked to the {place} on {day}.",
                "{name} was at the {place} on {day}.",
            ),
            (
                (("Where did {name} go?", "Which place did {name} visit?"), "{name} went to the {place}."),
                (
                    ("When did {name} go out?", "On which day did {name} go to the {place}?"),
                    "{name} went there on {day}.",
                ),
                (("Who visited the {place}?", "Who was at the {place}?"), "{name} was at the {place}."),
            ),
        ),
        "taste": Kind(
            (
                "{name} likes {food} but not {other}.",
                "{name} eats {food} and never {other}.",
                "{food_capital} please {name} more than {other}.",
            ),
            (
                (("What does {name} like to eat?", "Which food does {name} like?"), "{name} likes {food}."),
                (("What does {name} not like?", "Which food does {name} not eat?"), "{name} does not like {other}."),
            ),
        ),
        "gift": Kind(
            (
                "{name} gave {friend} {a_colour} {item}.",
                "{friend} got {a_colour} {item} from {name}.",
            ),
            (
                (("What did {name} give to {friend}?", "What did {friend} get?"), "{friend} got {a_colour} {item}."),
                (
                    ("Who gave the {item} away?", "From whom did {friend} get the {item}?"),
                    "{name} gave the {item} away.",
                ),
            ),
        ),
    }
)


def fact(rng: np.random.Generator, kind: str, name: str, friend: str) -> Fact:
    """Draw a fact of `kind` about `name`; `friend` is somebody else."""
    match kind:
        case "job":
            job = pick(rng, JOBS)
            fields = {"job": job, "a_job": a(job), "town": pick(rng, TOWNS)}
        case "age":
            fields = {"age": str(between(rng, 6, 90)), "month": pick(rng, MONTHS)}
        case "pet":
            colour = pick(rng, COLOURS)
            fields = {"colour": colour, "a_colour": a(colour), "animal": pick(rng, ANIMALS)}
        case "purchase":
            fields = {
                "a_material": a(pick(rng, MATERIALS)),
                "item": pick(rng, GOODS),
                "price": str(between(rng, 2, 60)),
            }
        case "trip":
            fields = {"place": pick(rng, PLACES), "day": pick(rng, DAYS)}
        case "taste":
            food, other = (plural(thing) for thing in some(rng, FOODS, 2))
            fields = {"food": food, "other": other, "food_capital": food.capitalize()}
        case "gift":
            fields = {"friend": friend, "a_colour": a(pick(rng, COLOURS)), "item": pick(rng, GOODS)}
        case _:
            raise KeyError(kind)
    return Fact(kind, {"name": name, **fields})


def facts_about(rng: np.random.Generator, kinds: Sequence[str]) -> list[Fact]:
    """Draw one fact per kind, about different people; no two facts share a word, so every question has one answer."""
    names = some(rng, PEOPLE, 2 * len(kinds))
    drawn: list[Fact] = []
    used: set[str] = set()
    for index, kind in enumerate(kinds):
        candidate = fact(rng, kind, names[2 * index], names[2 * index + 1])
        while used & set(candidate.fields.values()):
            candidate = fact(rng, kind, names[2 * index], names[2 * index + 1])
        used |= set(candidate.fields.values())
        drawn.append(candidate)
    return drawn


def scene(rng: np.random.Generator, count: int) -> list[Fact]:
    """Draw `count` facts in random order.

    In half of the scenes two facts are of one kind: an answer then needs the right person, not only the right kind.
    """
    kinds = some(rng, tuple(KINDS), count)
    if count > 1 and rng.random() < 0.5:
        kinds[1] = kinds[0]
    return some(rng, facts_about(rng, kinds), count)


def passage(rng: np.random.Generator, facts: Sequence[Fact]) -> str:
    """Say the facts one after another."""
    return " ".join(each.statement(rng) for each in facts)
