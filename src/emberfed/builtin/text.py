"""What is made of the built-in world: the instruction corpus, and the plain text for pretraining."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from emberfed.builtin.phrases import INSTRUCTIONS, QUESTIONS
from emberfed.builtin.tasks import TASKS, Exercise
from emberfed.builtin.words import (
    DAYS,
    FOODS,
    GOODS,
    GROUP_PLURALS,
    GROUPS,
    JOBS,
    MONTHS,
    PEOPLE,
    PLACES,
    TOWNS,
    a,
    between,
    capital,
    joined,
    pick,
    plural,
    some,
)
from emberfed.builtin.world import passage, scene
from emberfed.seeds import Seeds


def corpus(size: int, seeds: Seeds) -> list[dict[str, str]]:
    """Return `size` instruction records, as many of each category as of any other (give or take one), shuffled.

    No two records share both instruction and context.

    Returns:
        Records with Dolly's columns: `instruction`, `context` (may be empty), `response`, `category`.
    """
    rng = seeds.numpy("builtin corpus")
    names = tuple(TASKS)
    seen: set[tuple[str, str]] = set()
    records: list[dict[str, str]] = []
    while len(records) < size:
        category = names[len(records) % len(names)]
        exercise = TASKS[category](rng, INSTRUCTIONS)
        key = (exercise.instruction, exercise.context)
        if key in seen:
            continue
        seen.add(key)
        records.append(
            {
                "instruction": exercise.instruction,
                "context": exercise.context,
                "response": exercise.response,
                "category": category,
            }
        )
    return some(rng, records, size)


def plain_text(documents: int, seeds: Seeds) -> Iterator[str]:
    """Yield `documents` documents of the world's plain text: stories, lists, lessons, quizzes.

    None of it uses the instruction template or its wordings; some of it asks and answers, as ordinary text does.
    """
    rng = seeds.numpy("builtin plain text")
    for _ in range(documents):
        yield pick(rng, _DOCUMENTS)(rng)


def _story(rng: np.random.Generator) -> str:
    return passage(rng, scene(rng, between(rng, 1, 5)))


def _lesson(rng: np.random.Generator) -> str:
    group = pick(rng, tuple(GROUPS))
    things = some(rng, GROUPS[group], 3)
    one = "a piece of furniture" if group == "furniture" else a(group)
    return pick(
        rng,
        (
            f"{capital(a(things[0]))} is {one}. "
            f"{capital(plural(things[1]))} and {plural(things[2])} are {GROUP_PLURALS[group]} too.",
            f"{capital(GROUP_PLURALS[group])}: {joined(things)}.",
            f"{pick(rng, PEOPLE)} learned that {a(things[0])} is {one}, and so is {a(things[1])}.",
        ),
    )


def _calendar(rng: np.random.Generator) -> str:
    calendar = pick(rng, (DAYS, MONTHS))
    start = between(rng, 0, len(calendar) - 1)
    names = [calendar[(start + i) % len(calendar)] for i in range(between(rng, 3, 7))]
    return pick(rng, (f"After {names[0]} comes {names[1]}, then {names[2]}.", f"{', '.join(names)}."))


def _numbers(rng: np.random.Generator) -> str:
    first, second, step = between(rng, 1, 20), between(rng, 1, 20), between(rng, 1, 5)
    return pick(
        rng,
        (
            f"{first} and {second} make {first + second}.",
            f"{first + second} less {second} is {first}.",
            f"{min(first, second)} is not more than {max(first, second)}.",
            ", ".join(str(first + step * i) for i in range(6)) + ".",
        ),
    )


_LAYOUTS = (
    "{context}\n\n{question}\n{answer}",
    "{context}\nQ: {question}\nA: {answer}",
    "Q: {question}\n{context}\nA: {answer}",
    "Teacher: {question}\n{context}\nPupil: {answer}",
    "Someone asked: {question}\n\n{context}\n\nThe answer was:\n{answer}",
    '"{question}" asked {asker} from {town}.\n{context}\n{answer}',
    "{asker} read: {context}\nThen {asker} was asked: {question}\n{answer}",
)


_HEADINGS = ("{}:\n", "{}: ", "# {}\n", "{}\n", "* {} *\n")


def _worksheet(rng: np.random.Generator) -> str:
    """Return a layout with headings, as on a sheet of exercises."""
    heading = pick(rng, _HEADINGS)
    question = heading.format(pick(rng, ("Question", "Exercise", "Problem", "Task"))) + "{question}"
    context = heading.format(pick(rng, ("Text", "Story", "Passage", "Facts"))) + "{context}"
    answer = heading.format(pick(rng, ("Answer", "Solution", "Reply", "Result"))) + "{answer}"
    return "\n\n".join(pick(rng, ([question, context, answer], [context, question, answer])))


def _written(rng: np.random.Generator, exercise: Exercise) -> str:
    layout = _worksheet(rng) if rng.random() < 0.4 else pick(rng, _LAYOUTS)
    text = layout.format(
        question=exercise.instruction,
        context=exercise.context,
        answer=exercise.response,
        asker=pick(rng, PEOPLE),
        town=pick(rng, TOWNS),
    )
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text.strip()


def _quiz(rng: np.random.Generator) -> str:
    return _written(rng, TASKS[pick(rng, tuple(TASKS))](rng, QUESTIONS))


def _digest(rng: np.random.Generator) -> str:
    exercise = TASKS["summarizing"](rng, QUESTIONS)
    link = pick(rng, ("In short,", "In one sentence:", "The news of the day:"))
    return f"{exercise.context}\n\n{link} {exercise.response}"


def _dialogue(rng: np.random.Generator) -> str:
    facts = scene(rng, between(rng, 2, 4))
    first, second = some(rng, PEOPLE, 2)
    turns = [fact.question(rng) for fact in some(rng, facts, len(facts))]
    lines = [f"{first}: {question}\n{second}: {answer}" for question, answer in turns]
    return "\n".join([passage(rng, facts), *lines])


def _retold(rng: np.random.Generator) -> str:
    """Return the same facts twice, in other words and order: text that is best foretold by reading back."""
    facts = scene(rng, between(rng, 2, 5))
    link = pick(rng, ("{name} told it like this:", "That is to say:", "{name} wrote:", "Once more:"))
    again = passage(rng, some(rng, facts, len(facts)))
    return f"{passage(rng, facts)}\n{link.format(name=pick(rng, PEOPLE))} {again}"


def _recital(rng: np.random.Generator) -> str:
    """Return a list that is said twice."""
    pool = pick(rng, (PEOPLE, TOWNS, JOBS, FOODS, GOODS, PLACES, tuple(str(number) for number in range(1, 100))))
    words = ", ".join(some(rng, pool, between(rng, 3, 9)))
    link = pick(rng, ("Again:", "{name} repeats:", "One more time:", "{name} copied the list:"))
    return f"{words}\n{link.format(name=pick(rng, PEOPLE))} {words}"


_DOCUMENTS: tuple[Callable[[np.random.Generator], str], ...] = (
    _story,
    _lesson,
    _calendar,
    _numbers,
    _digest,
    *[_dialogue] * 2,
    *[_retold] * 3,
    *[_recital] * 2,
    *[_quiz] * 8,
)
