"""The base of every configuration section, and the one place that turns YAML and `--set` into checked values.

Each component declares its own `Section`; `config.py` only puts them together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from emberfed.errors import ConfigError, closest, one_of


class Section(BaseModel):
    """A frozen configuration section; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_truth_for_numbers(cls, values: Any) -> Any:
        """Python counts true as 1; a configuration that says so is mistaken."""
        for name, value in values.items() if isinstance(values, Mapping) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field and field.annotation not in (bool, bool | None):
                raise ValueError(f"{name} must not be {str(value).lower()}")
            for item in value if isinstance(value, list) else ():
                if isinstance(item, bool):
                    raise ValueError(f"{name} must not hold {str(item).lower()}")
        return values


S = TypeVar("S", bound=Section)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers people write: `1e-3` is a float here, as in YAML 1.2. A repeated key is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"key {key!r} is given twice (line {key_node.start_mark.line + 1}); keep one of them")
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text. Raises: ConfigError naming `where` and the line if it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{where}, line {line}: not valid YAML ({error.problem}); mend that line") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        # PyYAML lets through what Python says of impossible dates, keys that are lists, or endless nesting.
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"{where}: not a usable value ({type(error).__name__}: {reason})") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping. Raises: ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"config file {path} does not exist; `emberfed init` writes one to start from") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    value = parse_yaml(text, str(path))
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, found {type(value).__name__}")
    return value


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return `values` with `--set a.b=c` assignments applied; `c` is read as YAML. List items go by index (`a.0.b`).

    Raises: ConfigError if an assignment has no `=`, or walks through something that is not a mapping or a list.
    """
    result: Any = _copy(values)
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        parts = key.strip().split(".")
        if not separator or not all(parts):
            raise ConfigError(f"--set {assignment!r}: expected the form section.key=value, e.g. training.rounds=2")
        here = result
        for part in parts[:-1]:
            if isinstance(here, list):
                here = here[_index(part, here, assignment)]
            else:
                if here.get(part) is None:
                    here[part] = {}
                here = here[part]
            if not isinstance(here, dict | list):
                raise ConfigError(f"--set {assignment!r}: {part!r} is a plain value, not a section")
        value = parse_yaml(text, f"--set {assignment!r}")
        if isinstance(here, list):
            here[_index(parts[-1], here, assignment)] = value
        else:
            here[parts[-1]] = value
    return dict(result)


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copy(item) for item in value]
    return value


def _index(part: str, items: Sequence[Any], assignment: str) -> int:
    if part.isdecimal() and int(part) < len(items):
        return int(part)
    raise ConfigError(f"--set {assignment!r}: {part!r} is not an index of a list of {len(items)} items")


def validate(section: type[S], values: Any, where: str) -> S:
    """Check `values` against `section`. Raises: ConfigError naming each bad key, and the closest for unknown ones."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{where}: expected a section with keys, found {values!r}")
    try:
        return section.model_validate(dict(values))
    except ValidationError as error:
        lines = [_explain(section, problem, where) for problem in error.errors()]
        raise ConfigError("; ".join(lines)) from None


def _explain(section: type[BaseModel], problem: Mapping[str, Any], where: str) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join([where, *location]) if where else ".".join(location)
    if problem["type"] == "extra_forbidden":
        allowed = _fields_at(section, location[:-1])
        known = closest(location[-1], allowed) or f"; allowed here: {one_of(allowed) or 'nothing'}"
        return f"unknown key {key!r}{known}"
    if problem["type"] == "missing":
        return f"{key!r} is missing; give it a value"
    if problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        return _explain_tag(key, problem)
    if problem["type"] == "model_type":
        return f"{key!r}: expected a section with keys, found {problem['input']!r}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    if isinstance(problem["input"], Mapping) and problem["type"] == "value_error":
        return f"{key!r}: {message}"  # keys of a section that contradict each other; the message names them
    return f"{key!r}: {message[0].lower()}{message[1:]}, found {problem['input']!r}"


def _explain_tag(key: str, problem: Mapping[str, Any]) -> str:
    """Explain a section whose kind is missing or unknown."""
    tag = str(problem["ctx"]["discriminator"]).strip("'")
    if problem["type"] == "union_tag_not_found":
        return f"'{key}.{tag}' is missing; it says what the other keys mean"
    allowed = [name.strip(" '") for name in problem["ctx"]["expected_tags"].split(",")]
    found = str(problem["ctx"]["tag"])
    return f"'{key}.{tag}': unknown {found!r}{closest(found, allowed)} (there are {one_of(allowed)})"


def _fields_at(section: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names allowed at a location, walking nested sections, lists of them, and unions told apart by a tag."""
    here = [section]
    for part in location:
        tagged = [candidate for candidate in here if len(here) > 1 and part in _tags(candidate)]
        fields = [candidate.model_fields[part] for candidate in here if part in candidate.model_fields]
        below = [found for field in fields for found in _sections_in(field.annotation)]
        here = tagged or below or here  # neither: a list index
    return sorted({name for candidate in here for name in candidate.model_fields})


def _tags(section: type[BaseModel]) -> list[Any]:
    literals = [field.annotation for field in section.model_fields.values() if get_origin(field.annotation) is Literal]
    return [value for literal in literals for value in get_args(literal)]


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _sections_in(argument)]
