"""The commented configuration that `emberfed init` writes: the quickstart, every key with what its docstring says."""

from __future__ import annotations

import textwrap
from typing import Any

import yaml

from emberfed.cli.options import attribute_docs, summary_line
from emberfed.config import RunConfig
from emberfed.sections import Section

_HEAD = """\
# A configuration of emberfed: {what} with every key and its value.
# Run it:                 emberfed run {name}
# Change one key:         emberfed run {name} --set training.rounds=5
# See the data divided:   emberfed data inspect {name}
# Keys may be left out; they then have their defaults. Unknown keys are errors.
"""

_PLAIN = {
    "seed": "The seed of every random draw: same seed, same bits.",
    "method": "The federated method and its options.",
    "engine": "Where clients run, and the engine's options.",
}
_NAMED = {
    "method": "`emberfed methods` lists the names.",
    "engine": "`local`: in this process, one client after the other.",
}


def annotated(config: RunConfig, name: str, task: str = "generation") -> str:
    """Return the configuration as YAML with comments; `name` is the file it will be in, `task` what it is of."""
    what = "the built-in quickstart" if task == "generation" else f"an example of {task.replace('_', ' ')}"
    parts = [_HEAD.format(name=name, what=what)]
    for section, values in config.values().items():
        found = getattr(config, section, None)
        if isinstance(found, Section):
            parts.append(_section(section, type(found), values))
        else:
            parts.append(f"{_comment(_PLAIN[section], '')}{section}: {_flow(values)}\n")
    return "\n".join(parts)


def _section(name: str, section: type[Section], values: dict[str, Any]) -> str:
    """One section; those with a name say what the name is, since their other keys depend on it."""
    docs = {**attribute_docs(section), **({"name": _NAMED[name]} if name in _NAMED else {})}
    about = _PLAIN.get(name) or summary_line(section)
    lines = [_comment(about, ""), f"{name}:\n" if values else f"{name}: {{}}\n"]
    for key, value in values.items():
        lines.append(_comment(docs.get(key, ""), "  "))
        lines.append(_entry(key, value))
    return "".join(lines)


def _entry(key: str, value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join([f"  {key}:\n", *(f"    - {_flow(item)}\n" for item in value)])
    return f"  {key}: {_flow(value)}\n"


def _flow(value: Any) -> str:
    """Return a value as YAML on one line; keys of nested sections that are null are left out."""
    if isinstance(value, dict):
        value = {key: item for key, item in value.items() if item is not None}
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


def _comment(text: str, indent: str) -> str:
    return "".join(f"{indent}# {line}\n" for line in textwrap.wrap(text, 96 - len(indent), break_on_hyphens=False))
