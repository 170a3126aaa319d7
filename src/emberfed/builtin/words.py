"""The vocabulary of the built-in world, and the few rules of English that its sentences need."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    """
    Mara Tobin Ilse Anton Greta Hugo Nadia Oscar Petra Felix Clara Bruno Edith Jonas Lena Marcus Olga Peter Rosa
    Simon Tilda Victor Wanda Xenia Yusuf Zora Albert Bella Carlo Dora Emil Fiona Gustav Helga Ivan Judith Karim
    Laura Magnus Nina Otto Paula Quentin Ruth Samir Thea Ulrich Vera Walter Agnes Boris Celia Daniel Elena Frank
    Gloria Henry Irene Jacob Kira Leon Mina Norman Olivia Pablo Rita Stefan Tamara Ursula Vincent Wilma Adam
    Beatrice Conrad Diana Erik Flora George Hanna Igor Julia Kevin Lucia Martin Naomi Oliver Pia Robert Sonia
    Thomas Uma Viktor Wendy Arthur Britta Cyrus Delia Edgar Freya Gavin
    """
)
TOWNS = _words(
    """
    Harlow Brenford Ostwick Millbrook Dunmore Kestrel Larkhill Westfold Ashby Thornton Redcliff Silverton Oakham
    Pinewood Fairview Stonebridge Elmsford Greyport Highmoor Lowdale Northgate Riverton Saltmarsh Underhill
    Vinefield Whitby Yarrow Birchwood Coldwater Deepwell Eastham Foxhollow Glenrock Hazelton Ironbay Juniper
    Kingsmead Longford Marlow Newhaven
    """
)
JOBS = _words(
    """
    baker teacher farmer nurse painter tailor sailor miller doctor singer gardener builder carpenter writer
    driver fisher cook potter weaver hunter lawyer banker butcher dancer engineer artist actor plumber shepherd
    librarian postman waiter smith guard clerk mason
    """
)
PLACES = _words(
    """
    market mill station library harbour school bakery church museum garden bridge theatre castle hospital inn
    square tower beach forest farm
    """
)
COLOURS = ("red", "blue", "green", "grey", "white", "black", "brown", "yellow", "golden", "silver", "purple", "orange")
MATERIALS = ("wooden", "iron", "copper", "plastic", "heavy", "small", "large", "old", "new", "broken", "cheap", "long")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = _words("January February March April May June July August September October November December")

GROUPS: MappingProxyType[str, tuple[str, ...]] = MappingProxyType(
    {
        "animal": _words(
            """
            fox hen goat horse cow dog cat rabbit duck pig donkey owl bear deer crow frog snake lamb pony parrot
            """
        ),
        "fruit": _words("apple pear plum lemon cherry grape fig banana melon peach lime mango"),
        "vegetable": _words("carrot onion potato turnip bean leek pea pepper pumpkin radish cabbage beet"),
        "tool": _words("hammer saw shovel rake axe drill chisel spade ladder wrench file needle"),
        "garment": _words("coat hat scarf shirt jacket glove sock belt dress boot cap skirt"),
        "instrument": _words("violin drum flute guitar piano trumpet harp cello horn banjo organ fiddle"),
        "vehicle": _words("cart boat bicycle wagon train truck ferry sled bus tractor van canoe"),
        "furniture": _words("chair table bed shelf desk bench stool sofa cupboard wardrobe dresser couch"),
    }
)
"""Each group of things and its members; no word belongs to two groups."""

GROUP_PLURALS: MappingProxyType[str, str] = MappingProxyType(
    {group: group if group == "furniture" else f"{group}s" for group in GROUPS}
)
ANIMALS = GROUPS["animal"]
FOODS = GROUPS["fruit"] + GROUPS["vegetable"]
GOODS = tuple(thing for group in ("tool", "garment", "instrument", "furniture") for thing in GROUPS[group])
DISHES = ("soup", "bread", "cake", "stew", "pie", "cheese", "tea", "salad", "fish", "rice")

VERBS = tuple(
    tuple(forms.split("/"))
    for forms in _words(
        """
        carry/carries/carried/carried paint/paints/painted/painted clean/cleans/cleaned/cleaned
        repair/repairs/repaired/repaired sell/sells/sold/sold find/finds/found/found
        hide/hides/hid/hidden lose/loses/lost/lost buy/buys/bought/bought
        bring/brings/brought/brought take/takes/took/taken steal/steals/stole/stolen
        break/breaks/broke/broken borrow/borrows/borrowed/borrowed build/builds/built/built
        move/moves/moved/moved wash/washes/washed/washed drop/drops/dropped/dropped
        send/sends/sent/sent keep/keeps/kept/kept
        """
    )
)
"""Verb forms: base, third person, past, participle."""

_PLURALS = {"potato": "potatoes", "mango": "mangoes", "shelf": "shelves", "deer": "deer"}


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """Return one of `values`."""
    return values[int(rng.integers(len(values)))]


def some(rng: np.random.Generator, values: Sequence[T], count: int) -> list[T]:
    """Return `count` different elements of `values`, in random order."""
    return [values[int(i)] for i in rng.permutation(len(values))[:count]]


def between(rng: np.random.Generator, low: int, high: int) -> int:
    """Return an integer from `low` to `high`, both included."""
    return int(rng.integers(low, high + 1))


def a(noun: str) -> str:
    """Return `noun` with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeio" else f"a {noun}"


def plural(noun: str) -> str:
    """Return the plural of one of this world's nouns."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if noun.endswith(("s", "sh", "ch", "x")) else f"{noun}s"


def count_of(number: int, noun: str) -> str:
    """Return `number` things: `1 apple`, `3 apples`."""
    return f"{number} {noun if number == 1 else plural(noun)}"


def joined(items: Sequence[str]) -> str:
    """Return `a`, `a and b` or `a, b and c`."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def capital(text: str) -> str:
    """Return `text` with its first letter in upper case."""
    return text[0].upper() + text[1:]
