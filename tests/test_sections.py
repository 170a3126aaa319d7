"""Configuration: YAML as people write it, `--set`, and errors that name the key and the closest allowed one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from emberfed.errors import ConfigError
from emberfed.sections import Section, override, parse_yaml, read_yaml, validate


class Inner(Section):
    learning_rate: float = 0.1
    steps: int = Field(1, ge=1)


class Outer(Section):
    inner: Inner = Inner()
    many: list[Inner] = Field(default_factory=list)
    maybe: Inner | None = None
    name: str = "x"


@given(st.floats(1e-12, 1e12))
def test_numbers_in_every_notation_are_numbers(value: float) -> None:
    for text in (f"{value:e}", repr(value), f"{value:.0e}".replace("+", "")):
        found = parse_yaml(f"x: {text}", "here")["x"]
        assert isinstance(found, float | int)
        assert found == pytest.approx(float(text))


def test_merge_keys_and_anchors_work() -> None:
    text = "base: &base {a: 1, b: 2}\nother:\n  <<: *base\n  b: 3"
    assert parse_yaml(text, "here")["other"] == {"a": 1, "b": 3}


def test_words_that_only_look_like_numbers_stay_words() -> None:
    assert parse_yaml("[1e, e3, 1e3e, v1e-3, '1e-3']", "here") == ["1e", "e3", "1e3e", "v1e-3", "1e-3"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1", "line 1: not valid YAML|line 2: not valid YAML"),
        ("a: 1\nb: 2\na: 3", "here: key 'a' is given twice .line 3"),
        ("\x00", "here: not valid YAML"),
        ("? [a, b]\n: 1", "here: not a usable value|here, line"),
        ("x: 2020-13-45", "here: not a usable value"),
        ("x: !!int abc", "here: not a usable value"),
        ("[" * 3000, "here: not a usable value|here, line"),
    ],
)
def test_broken_yaml_names_the_place(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        parse_yaml(text, "here")
    assert "\n" not in str(caught.value)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(ConfigError, match="does not exist"):
        read_yaml(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path)
    path.write_text("- 1")
    with pytest.raises(ConfigError, match="mapping of sections, found list"):
        read_yaml(path)
    path.write_text("")
    assert read_yaml(path) == {}
    path.write_text("inner: {steps: 2}")
    assert read_yaml(path) == {"inner": {"steps": 2}}


def test_overrides_reach_into_sections_and_lists_and_leave_the_input_alone() -> None:
    values = {"inner": {"steps": 1}, "many": [{"steps": 1}, {"steps": 1}], "empty": None}
    changed = override(values, ["inner.learning_rate=1e-3", "many.1.steps=5", "new.deep=[a, b]", "empty.x=null"])
    assert changed == {
        "inner": {"steps": 1, "learning_rate": 1e-3},
        "many": [{"steps": 1}, {"steps": 5}],
        "new": {"deep": ["a", "b"]},
        "empty": {"x": None},
    }
    assert values == {"inner": {"steps": 1}, "many": [{"steps": 1}, {"steps": 1}], "empty": None}


@pytest.mark.parametrize(
    ("assignment", "words"),
    [
        ("inner.steps", "expected the form section.key=value"),
        (".x=1", "expected the form"),
        ("inner.steps.x=1", "'steps' is a plain value"),
        ("many.2.steps=1", "'2' is not an index of a list of 1 items"),
        ("many.x=1", "'x' is not an index"),
        ("inner.steps=[", "not valid YAML"),
    ],
)
def test_bad_overrides(assignment: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        override({"inner": {"steps": 1}, "many": [{}]}, [assignment])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"iner": {}}, "unknown key 'iner'; did you mean 'inner'?"),
        ({"inner": {"learningrate": 1}}, "unknown key 'inner.learningrate'; did you mean 'learning_rate'?"),
        ({"inner": {"zzz": 1}}, "unknown key 'inner.zzz'; allowed here: 'learning_rate', 'steps'"),
        ({"many": [{"stepz": 1}]}, "unknown key 'many.0.stepz'; did you mean 'steps'?"),
        ({"maybe": {"stepz": 1}}, "unknown key 'maybe.stepz'; did you mean 'steps'?"),
        ({"inner": {"steps": 0}}, "'inner.steps': input should be greater than or equal to 1, found 0"),
        ({"inner": {"steps": "three"}}, "'inner.steps': input should be a valid integer"),
        ({"inner": {"learning_rate": float("nan")}}, "'inner.learning_rate': input should be a finite number"),
        ({"inner": {"steps": True}}, "'inner': steps must not be true"),
        ({"inner": 3}, "'inner': expected a section with keys, found 3"),
    ],
)
def test_problems_are_named_with_a_way_out(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate(Outer, values, "")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_keys_and_wrong_sections() -> None:
    class Strict(Section):
        needed: int

    with pytest.raises(ConfigError, match="'here.needed' is missing"):
        validate(Strict, {}, "here")
    with pytest.raises(ConfigError, match="here: expected a section with keys, found 3"):
        validate(Strict, 3, "here")


def test_a_value_where_a_section_belongs() -> None:
    class Inner(Section):
        size: int = 1

    class Outer(Section):
        inner: Inner = Inner()

    with pytest.raises(ConfigError, match=r"^'method.inner': expected a section with keys, found 'fedadam'$"):
        validate(Outer, {"inner": "fedadam"}, "method")
