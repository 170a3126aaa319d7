"""The options of a configuration section, read from its class: name, type, default, and what its docstring says."""

from __future__ import annotations

import inspect
import re
import types
import typing
from dataclasses import asdict, dataclass
from typing import Any, final

from emberfed.sections import Section


@final
@dataclass(frozen=True, slots=True)
class Option:
    """One key of a section; a required one has the default None."""

    name: str
    kind: str
    required: bool
    default: Any
    help: str

    def json(self) -> dict[str, Any]:
        """Return the option as plain values."""
        default = self.default.model_dump(mode="json") if isinstance(self.default, Section) else self.default
        return {**asdict(self), "default": default}


def options(section: type[Section]) -> tuple[Option, ...]:
    """Return the options of a section in the order they are declared."""
    helps = {name: text for cls in reversed(section.__mro__) for name, text in attribute_docs(cls).items()}
    return tuple(
        Option(
            name,
            kind(field.annotation),
            field.is_required(),
            None if field.is_required() else field.get_default(call_default_factory=True),
            helps.get(name, ""),
        )
        for name, field in section.model_fields.items()
    )


def attribute_docs(cls: type) -> dict[str, str]:
    """Return what the `Attributes:` part of a Google-style docstring says, by name.

    Where several names share one description (`low, high: ...`), the first has it.
    """
    _, found, listing = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {}
    current = ""
    for line in listing.split("\n") if found else ():
        if line and not line.startswith(" "):
            break
        entry = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if entry:
            current = entry.group(1).split(", ")[0]
            docs[current] = entry.group(2)
        elif current and line.strip():
            docs[current] += f" {line.strip()}"
    return docs


def summary_line(cls: type) -> str:
    """Return the first paragraph of a docstring as one line."""
    return " ".join((inspect.getdoc(cls) or "").partition("\n\n")[0].split())


def kind(annotation: Any) -> str:
    """Return a type as people write it: `int or null`, `adam | adamw`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return kind(arguments[0])
    if origin is typing.Literal:
        return " | ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind(argument) for argument in arguments))
    if annotation is types.NoneType:
        return "null"
    if origin in (list, tuple):
        items = dict.fromkeys(kind(argument) for argument in arguments if argument is not Ellipsis)
        return f"list of {' or '.join(items)}"
    if origin is dict or (isinstance(annotation, type) and issubclass(annotation, Section)):
        return "section"
    return str(getattr(annotation, "__name__", annotation))
