"""HTML that cannot forget to escape: whatever is not already `Html` is text."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import final

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
_VOID = frozenset({"meta", "br", "hr"})


@final
class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def printable(text: str) -> str:
    """Return `text` with control characters, and halves of surrogate pairs, which no page can hold, replaced."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def escape(text: str) -> Html:
    """Return `text` as HTML."""
    return text if isinstance(text, Html) else Html(html.escape(printable(text)))


def join(parts: Iterable[str], separator: str = "") -> Html:
    """Return the parts one after another, each escaped unless it is HTML already."""
    return Html(escape(separator).join(escape(part) for part in parts))


def tag(name: str, /, *children: str, **attributes: str) -> Html:
    """Return an element. `class_` stands for `class`, and `_` in a name for `-` (`aria_label`)."""
    listed = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(printable(value))}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Html(f"<{name}{listed}>")
    return Html(f"<{name}{listed}>{join(children)}</{name}>")


def table(caption: str, headers: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> Html:
    """Return a table that scrolls in its own box; each row's first cell is its header.

    The first `words` columns hold words and read from the left; the others hold numbers.
    """
    kinds = ["word" if place < words else "number" for place in range(len(headers))]
    head = [tag("th", header, scope="col", class_=kind) for header, kind in zip(headers, kinds, strict=True)]
    body = [_row(row, kinds) for row in rows]
    inner = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), aria_label=caption)
    # The caption stands outside the box, so that it stays in view when a wide table scrolls.
    box = tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption)
    return tag("div", tag("p", caption, class_="caption", aria_hidden="true"), box, class_="table")


def _row(cells: Sequence[str], kinds: Sequence[str]) -> Html:
    first, *rest = zip(cells, kinds, strict=True)
    header = tag("th", first[0], scope="row", class_=first[1])
    return tag("tr", header, *(tag("td", cell, class_=kind) for cell, kind in rest), Html("\n"))
