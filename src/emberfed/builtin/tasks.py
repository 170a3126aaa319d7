"""Exercises about the built-in world in eight categories, each with the one answer that its text allows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import final

import numpy as np

from emberfed.builtin.phrases import Phrases
from emberfed.builtin.words import (
    DAYS,
    DISHES,
    FOODS,
    GOODS,
    GROUP_PLURALS,
    GROUPS,
    JOBS,
    MATERIALS,
    MONTHS,
    PEOPLE,
    PLACES,
    TOWNS,
    VERBS,
    a,
    between,
    capital,
    count_of,
    joined,
    pick,
    plural,
    some,
)
from emberfed.builtin.world import Fact, facts_about, passage, scene


@final
@dataclass(frozen=True, slots=True)
class Exercise:
    """What is asked, the text it is asked of (may be empty), and the answer."""

    instruction: str
    context: str
    response: str


Task = Callable[[np.random.Generator, Phrases], Exercise]


def _exercise(
    rng: np.random.Generator, phrases: Phrases, key: str, context: str, response: str, **fields: str
) -> Exercise:
    return Exercise(pick(rng, phrases[key]).format(**fields), context, response)


# Extraction: which kind of fact holds such things, the field, and how one of them is written in the answer.
_TARGETS: Mapping[str, tuple[str, str, str]] = MappingProxyType(
    {
        "people": ("trip", "name", "{}"),
        "towns": ("job", "town", "{}"),
        "jobs": ("job", "job", "{}"),
        "animals": ("pet", "animal", "{}"),
        "colours": ("pet", "colour", "{}"),
        "prices": ("purchase", "price", "{} coins"),
        "goods": ("purchase", "item", "{}"),
        "days": ("trip", "day", "{}"),
        "places": ("trip", "place", "{}"),
        "ages": ("age", "age", "{}"),
    }
)
# A distractor of these kinds would hold another thing of the kind that is asked for.
_CLASHES: Mapping[str, frozenset[str]] = MappingProxyType(
    {"colours": frozenset({"gift"}), "goods": frozenset({"gift"}), "people": frozenset({"gift"})}
)


def extraction(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for every thing of one kind in a text that holds other things too."""
    things = pick(rng, tuple(_TARGETS))
    kind, field, written = _TARGETS[things]
    allowed = [
        other for other in ("job", "age", "pet", "purchase", "trip", "taste", "gift")
        if other != kind and other not in _CLASHES.get(things, frozenset())
    ]  # fmt: skip
    kinds = [kind] * between(rng, 2, 3) + [pick(rng, allowed)]
    facts = some(rng, facts_about(rng, kinds), len(kinds))
    context = passage(rng, facts)
    values = [fact.fields[field] for fact in facts if things == "people" or fact.kind == kind]
    found = sorted(values, key=lambda value: _position(value, context))
    return _exercise(
        rng, phrases, "extract", context, joined([written.format(value) for value in found]), things=things
    )


def _position(word: str, text: str) -> int:
    match = re.search(rf"\b{re.escape(word)}\b", text)
    assert match is not None, f"{word!r} is not in {text!r}"
    return match.start()


def closed_qa(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask about one fact of a text that states several."""
    facts = scene(rng, between(rng, 2, 4))
    question, answer = pick(rng, facts).question(rng)
    return _exercise(rng, phrases, "closed_qa", passage(rng, facts), answer, question=question)


def classification(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for a group, an odd one out, an opinion or a kind of message."""
    return pick(rng, (_group, _odd, _sentiment, _message))(rng, phrases)


def _group(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    groups = some(rng, tuple(GROUPS), 3)
    thing = pick(rng, GROUPS[groups[0]])
    options = [_one_of_group(group) for group in some(rng, groups, 3)]
    context = pick(rng, ("the {material} {thing} of {name}", "{a_thing} from {town}", "{name}'s {thing}")).format(
        material=pick(rng, MATERIALS), thing=thing, a_thing=a(thing), name=pick(rng, PEOPLE), town=pick(rng, TOWNS)
    )
    response = f"{capital(a(thing))} is {_one_of_group(groups[0])}."
    return _exercise(
        rng, phrases, "group", capital(context), response, options=f"{options[0]}, {options[1]} or {options[2]}"
    )


def _one_of_group(group: str) -> str:
    return "a piece of furniture" if group == "furniture" else a(group)


def _odd(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    common, other = some(rng, tuple(GROUPS), 2)
    odd = pick(rng, GROUPS[other])
    words = some(rng, [*some(rng, GROUPS[common], between(rng, 3, 4)), odd], 5)
    response = f"{capital(a(odd))} is {_one_of_group(other)}, the others are {GROUP_PLURALS[common]}."
    return _exercise(rng, phrases, "odd", ", ".join(words), response)


_PRAISE = (
    "was fresh and warm",
    "tasted wonderful",
    "was better than at home",
    "made us all smile",
    "was a real pleasure",
)
_BLAME = ("was cold and late", "tasted of nothing", "made me sick", "was far too salty", "was burnt and dry")


def _sentiment(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    first, second = some(rng, DISHES, 2)
    opinion = pick(rng, ("positive", "negative", "mixed"))
    pools = {"positive": (_PRAISE, _PRAISE), "negative": (_BLAME, _BLAME), "mixed": some(rng, (_PRAISE, _BLAME), 2)}
    said = [pick(rng, pool) for pool in pools[opinion]]
    link = "but" if opinion == "mixed" else "and"
    guest, town = pick(rng, PEOPLE), pick(rng, TOWNS)
    context = f"{guest} ate at the inn of {town}: the {first} {said[0]}, {link} the {second} {said[1]}."
    return _exercise(rng, phrases, "sentiment", context, f"The opinion on the {first} and the {second} is {opinion}.")


_MESSAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "complaint": (
            "The {thing} you sold me is broken. I want my {price} coins back.",
            "I am angry: your {thing} came too late.",
        ),
        "question": ("How much does the {thing} in your window cost?", "Do you still have the {thing} from {town}?"),
        "order": ("Please send me {a_thing} to {town} by {day}.", "I would like to buy {a_thing} for {price} coins."),
        "invitation": (
            "Come to {town} on {day} to see my new {thing}!",
            "You and your {thing} are welcome at our party on {day}.",
        ),
    }
)


def _message(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    kind = pick(rng, tuple(_MESSAGES))
    thing = pick(rng, GOODS)
    text = pick(rng, _MESSAGES[kind]).format(
        thing=thing, a_thing=a(thing), price=between(rng, 2, 60), town=pick(rng, TOWNS), day=pick(rng, DAYS)
    )
    opening = text if text.startswith("I ") else f"{text[0].lower()}{text[1:]}"
    context = f"Dear {pick(rng, PEOPLE)}, {opening} {pick(rng, PEOPLE)}"
    return _exercise(rng, phrases, "message", context, f"This is {a(kind)} about {a(thing)}.")


_OPENINGS = ("It was a {weather} day.", "The streets were full.", "Nobody had expected it.", "The week had been long.")
_ENDINGS = (
    "Everybody talked about it.", "{friend} saw it and laughed.", "In the evening {friend} heard of it.",
    "Then it began to rain.", "{friend} was very glad.",
)  # fmt: skip


def summarizing(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for who did what, where and when, told over several sentences with some that do not matter."""
    name, friend = some(rng, PEOPLE, 2)
    job, place, day, item = pick(rng, JOBS), pick(rng, PLACES), pick(rng, DAYS), pick(rng, GOODS)
    _, _, past, _ = pick(rng, VERBS)
    middle = pick(
        rng,
        (
            f"{name} is {a(job)} in {pick(rng, TOWNS)}. On {day} {name} was at the {place} and {past} {a(item)} there.",
            f"On {day} {a(job)} called {name} came to the {place}. There {name} {past} {a(item)}.",
            f"{name}, {a(job)}, went to the {place} on {day}. Before noon {name} {past} {a(item)}.",
        ),
    )
    opening = pick(rng, _OPENINGS).format(weather=pick(rng, ("warm", "cold", "rainy", "sunny", "windy")))
    ending = pick(rng, _ENDINGS).format(friend=friend)
    parts = {0: (opening, middle, ending), 1: (middle, ending), 2: (opening, middle)}[between(rng, 0, 2)]
    response = f"{name} the {job} {past} {a(item)} at the {place} on {day}."
    return _exercise(rng, phrases, "summary", " ".join(parts), response)


def rewriting(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for the same sentence in another tense, voice, tone or with another name."""
    name, other = some(rng, PEOPLE, 2)
    base, third, past, participle = pick(rng, VERBS)
    thing = f"the {pick(rng, MATERIALS)} {pick(rng, GOODS)}"
    where = f"at the {pick(rng, PLACES)}" if rng.random() < 0.5 else f"on {pick(rng, DAYS)}"
    key = pick(rng, ("past", "future", "passive", "polite", "question", "negative", "replace"))
    sentence, response = {
        "past": (f"{name} {third} {thing} {where}.", f"{name} {past} {thing} {where}."),
        "future": (f"{name} {past} {thing} {where}.", f"{name} will {base} {thing} {where}."),
        "passive": (f"{name} {past} {thing} {where}.", f"{capital(thing)} was {participle} by {name} {where}."),
        "polite": (f"{capital(base)} {thing}, {name}!", f"Could you please {base} {thing}, {name}?"),
        "question": (f"{name} {past} {thing} {where}.", f"Did {name} {base} {thing} {where}?"),
        "negative": (f"{name} {past} {thing} {where}.", f"{name} did not {base} {thing} {where}."),
        "replace": (f"{name} {past} {thing} {where}.", f"{other} {past} {thing} {where}."),
    }[key]
    return _exercise(rng, phrases, key, sentence, response, old=name, new=other)


def ordering(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for people, goods, numbers, words or dates in order."""
    return pick(rng, (_by_age, _by_price, _by_size, _by_letter, _by_time))(rng, phrases)


def _by_field(
    rng: np.random.Generator, phrases: Phrases, key: str, kind: str, fields: tuple[str, str], ways: tuple[str, str]
) -> Exercise:
    facts: Sequence[Fact] = facts_about(rng, [kind] * between(rng, 2, 3))
    way = between(rng, 0, 1)
    ranked = sorted(facts, key=lambda fact: int(fact.fields[fields[0]]), reverse=way == 1)
    response = joined([fact.fields[fields[1]] for fact in ranked])
    return _exercise(rng, phrases, key, passage(rng, facts), response, direction=ways[way])


def _by_age(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    return _by_field(rng, phrases, "by_age", "age", ("age", "name"), ("youngest to oldest", "oldest to youngest"))


def _by_price(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    ways = ("cheapest to dearest", "dearest to cheapest")
    return _by_field(rng, phrases, "by_price", "purchase", ("price", "item"), ways)


def _by_size(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    numbers = [int(i) + 1 for i in rng.permutation(60)[: between(rng, 3, 5)]]
    way = between(rng, 0, 1)
    response = joined([str(number) for number in sorted(numbers, reverse=way == 1)])
    direction = ("smallest to largest", "largest to smallest")[way]
    return _exercise(rng, phrases, "by_size", ", ".join(map(str, numbers)), response, direction=direction)


def _by_letter(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    letters: dict[str, str] = {}
    for word in some(rng, pick(rng, (PEOPLE, TOWNS, JOBS, FOODS, GOODS)), 8):
        letters.setdefault(word[0], word)
    words = list(letters.values())[: between(rng, 3, 4)]
    return _exercise(rng, phrases, "by_letter", ", ".join(words), joined(sorted(words)))


def _by_time(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    units, calendar = pick(rng, (("days", DAYS), ("months", MONTHS)))
    chosen = some(rng, calendar, between(rng, 3, 4))
    response = joined(sorted(chosen, key=calendar.index))
    return _exercise(rng, phrases, "by_time", ", ".join(chosen), response, units=units)


def arithmetic(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for a sum, a difference or a product of small numbers in a story."""
    return pick(rng, (_gain, _loss, _total, _product, _difference))(rng, phrases)


def _gain(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    name, food = pick(rng, PEOPLE), pick(rng, FOODS)
    first, second = between(rng, 2, 20), between(rng, 2, 9)
    frame = pick(rng, ("{name} has {had} and picks {more} more.", "{name} had {had}. Then {name} got {more} more."))
    context = frame.format(name=name, had=count_of(first, food), more=second)
    response = f"{name} has {count_of(first + second, food)} now."
    return _exercise(rng, phrases, "gain", context, response, things=plural(food), name=name)


def _loss(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    (name, friend), food = some(rng, PEOPLE, 2), pick(rng, FOODS)
    taken = between(rng, 2, 9)
    first = taken + between(rng, 1, 15)
    frame = pick(
        rng, ("{name} has {had} and gives {taken} to {friend}.", "{name} had {had}, but {friend} ate {taken}.")
    )
    context = frame.format(name=name, had=count_of(first, food), taken=taken, friend=friend)
    response = f"{name} has {count_of(first - taken, food)} left."
    return _exercise(rng, phrases, "loss", context, response, things=plural(food), name=name)


def _total(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    first, second = some(rng, GOODS, 2)
    one, two = between(rng, 2, 20), between(rng, 2, 20)
    frame = pick(
        rng,
        (
            "{name} pays {one} coins for {first} and {two} coins for {second}.",
            "{first_capital} costs {one} coins. {name} also takes {second} for {two} coins.",
        ),
    )
    context = frame.format(
        name=pick(rng, PEOPLE), one=one, two=two, first=a(first), second=a(second), first_capital=capital(a(first))
    )
    return _exercise(rng, phrases, "total", context, f"The {first} and the {second} cost {one + two} coins together.")


def _product(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    food, boxes, each = pick(rng, FOODS), between(rng, 2, 6), between(rng, 2, 6)
    box = pick(rng, ("box", "basket", "bag", "jar"))
    context = f"{pick(rng, PEOPLE)} has {count_of(boxes, box)} with {count_of(each, food)} in each."
    response = f"There are {count_of(boxes * each, food)} in {count_of(boxes, box)}."
    return _exercise(rng, phrases, "product", context, response, things=plural(food))


def _difference(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    facts = facts_about(rng, ["age", "age"])
    old, young = sorted(facts, key=lambda fact: int(fact.fields["age"]), reverse=True)
    gap = int(old.fields["age"]) - int(young.fields["age"])
    response = f"{old.fields['name']} is {count_of(gap, 'year')} older than {young.fields['name']}."
    return _exercise(rng, phrases, "difference", passage(rng, facts), response)


def listing(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    """Ask for a list: the members of a group, the visitors of a place, days, months or numbers."""
    return pick(rng, (_filter, _filter, _visitors, _calendar, _count))(rng, phrases)


def _filter(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    group, *others = some(rng, tuple(GROUPS), 3)
    wanted = some(rng, GROUPS[group], between(rng, 2, 3))
    rest = [pick(rng, GROUPS[other]) for other in others]
    things = some(rng, wanted + rest, len(wanted) + len(rest))
    name = pick(rng, PEOPLE)
    frame = pick(
        rng, ("In the barn of {name} there are {all}.", "{name} drew {all}.", "{name} sees {all} in the picture.")
    )
    context = frame.format(name=name, all=joined([a(thing) for thing in things]))
    return _exercise(
        rng,
        phrases,
        "filter",
        context,
        joined([thing for thing in things if thing in wanted]),
        things=GROUP_PLURALS[group],
    )


def _visitors(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    place, other = some(rng, PLACES, 2)
    names = some(rng, PEOPLE, between(rng, 3, 4))
    went = [place, place, *(pick(rng, (place, other)) for _ in names[2:-1]), other]
    visits = some(rng, list(zip(names, went, strict=True)), len(names))
    context = " ".join(f"{name} {pick(rng, ('went to', 'came to', 'was at'))} the {where}." for name, where in visits)
    response = joined([name for name, where in visits if where == place])
    return _exercise(rng, phrases, "visitors", context, response, place=place)


def _calendar(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    units, calendar = pick(rng, (("days", DAYS), ("months", MONTHS), ("months", MONTHS)))
    key, step = pick(rng, (("after", 1), ("before", -1)))
    start, number = between(rng, 0, len(calendar) - 1), between(rng, 2, 4)
    steps = range(1, number + 1) if step == 1 else range(-number, 0)
    response = joined([calendar[(start + i) % len(calendar)] for i in steps])
    written = {2: "two", 3: "three", 4: "four"}[number]
    return _exercise(rng, phrases, key, "", response, number=written, units=units, start=calendar[start])


def _count(rng: np.random.Generator, phrases: Phrases) -> Exercise:
    start, step, number = between(rng, 1, 30), between(rng, 1, 5), between(rng, 3, 5)
    numbers = [start + step * i for i in range(number)]
    return _exercise(
        rng, phrases, "count", "", joined([str(n) for n in numbers]),
        start=str(start), end=str(numbers[-1]), step=str(step),
    )  # fmt: skip


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "extraction": extraction,
        "closed_qa": closed_qa,
        "classification": classification,
        "summarizing": summarizing,
        "rewriting": rewriting,
        "ordering": ordering,
        "arithmetic": arithmetic,
        "listing": listing,
    }
)
"""The eight categories."""
