"""Every shape of instruction data is recognised and mapped to the one schema; what is not is refused in words."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emberfed.data.config import Format
from emberfed.data.formats import SCHEMA, check_columns, conversation, normalise, recognise
from emberfed.errors import DataError

COLUMNS: dict[Format, tuple[str, ...]] = {
    "dolly": ("instruction", "context", "response", "category"),
    "alpaca": ("instruction", "input", "output"),
    "sharegpt": ("conversations",),
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
}


def turns(*contents: str, roles: tuple[str, ...] = ("user", "assistant")) -> list[dict[str, str]]:
    """Turns by the roles in rotation."""
    return [{"role": role, "content": text} for role, text in zip(itertools.cycle(roles), contents, strict=False)]


EXPECTED: dict[str, Any] = {"instruction": "ask", "context": "", "response": "answer", "category": "", "history": []}
RECORDS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "dolly",
        {"instruction": " ask\n", "context": "text ", "response": " answer", "category": "qa"},
        {"context": "text", "category": "qa"},
    ),
    ("dolly", {"instruction": "ask", "response": "answer"}, {}),
    ("alpaca", {"instruction": "ask", "input": "text", "output": "answer"}, {"context": "text"}),
    ("alpaca", {"instruction": "ask", "input": None, "output": "answer", "category": 3}, {"category": "3"}),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "answer"}]},
        {},
    ),
    ("sharegpt", {"conversations": turns("ask", "answer")}, {}),
    ("messages", {"messages": turns("ask", "answer")}, {}),
    ("prompt_completion", {"prompt": "ask", "completion": "answer"}, {}),
    ("prompt_completion", {"prompt": turns("ask"), "completion": turns("answer", roles=("assistant",))}, {}),
    ("prompt_completion", {"prompt": turns("ask"), "completion": "answer"}, {}),
    (
        "prompt_completion",
        {"prompt": turns("be kind", "ask", roles=("system", "user")), "completion": "answer"},
        {"history": [{"role": "system", "content": "be kind"}]},
    ),
    ("question_answer", {"question": "ask", "answer": "answer"}, {}),
    ("question_answer", {"question": "ask", "answer": "answer", "context": "text"}, {"context": "text"}),
    ("question_answer", {"question": "ask", "answer": 42}, {"response": "42"}),
]


@pytest.mark.parametrize(("format", "record", "differs"), RECORDS)
def test_each_format_maps_to_the_schema(format: Format, record: dict[str, Any], differs: dict[str, Any]) -> None:
    before = repr(record)
    assert recognise(list(record), "data") == format
    assert check_columns(format, list(record), "data") == format
    mapped = normalise(format, record, "record 1")
    assert mapped == {**EXPECTED, **differs}
    assert set(mapped) == set(SCHEMA)
    assert repr(record) == before


@pytest.mark.parametrize("format", COLUMNS)
def test_more_columns_do_not_hide_a_format(format: Format) -> None:
    assert recognise([*COLUMNS[format], "id", "source"], "data") == format
    assert recognise(list(reversed(COLUMNS[format])), "data") == format


@pytest.mark.parametrize(
    "columns", [["text"], [], ["instruction"], ["output", "input"], ["messages_raw"], ["prompt", "answer"]]
)
def test_unknown_columns_are_listed_with_the_known_formats(columns: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        recognise(columns, "data here.jsonl")
    message = str(caught.value)
    assert str(sorted(columns)) in message
    for format, wanted in COLUMNS.items():
        assert format in message
        assert wanted[0] in message
    assert message.startswith("data here.jsonl: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    "columns",
    [("instruction", "input", "response"), ("instruction", "context", "output"), ("question", "input", "answer")],
)
def test_a_context_under_another_formats_name_is_not_lost_silently(columns: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="no known format"):
        recognise(columns, "data here.jsonl")


def test_a_format_asked_for_names_the_column_it_lacks() -> None:
    with pytest.raises(DataError, match=r"'alpaca' needs the column 'output'; the data has \['instruction', 'text'\]"):
        check_columns("alpaca", ["text", "instruction"], "data")
    assert check_columns("auto", ["question", "answer"], "data") == "question_answer"


def test_the_format_asked_for_wins_over_the_one_recognised() -> None:
    both = ["instruction", "context", "response", "question", "answer"]
    assert recognise(both, "data") == "dolly"
    assert check_columns("question_answer", both, "data") == "question_answer"


@pytest.mark.parametrize(
    ("format", "record", "words"),
    [
        ("dolly", {"instruction": "a", "response": ["b"]}, "record 7: 'response' must be text, found list"),
        ("dolly", {"instruction": True, "response": "b"}, "'instruction' must be text, found bool"),
        ("messages", {"messages": "hello"}, "record 7, 'messages': expected a list of turns, found str"),
        ("messages", {"messages": [{"role": "narrator", "content": "a"}]}, "unknown role 'narrator'"),
        ("messages", {"messages": [{"role": "user"}]}, "turn 0 must have 'role' and 'content'"),
        ("sharegpt", {"conversations": [{"from": "human", "text": "a"}]}, "turn 0 must have 'from' and 'value'"),
        ("sharegpt", {"conversations": ["a"]}, "turn 0 must have"),
        (
            "prompt_completion",
            {"prompt": "a", "completion": [{"role": "user", "content": "b"}]},
            "'completion' must be",
        ),
    ],
)
def test_malformed_records_are_named(format: Format, record: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError) as caught:
        normalise(format, record, "record 7")
    assert words in str(caught.value)
    assert "record 7" in str(caught.value)


@pytest.mark.parametrize("role", ["human", "user", "prompter"])
@pytest.mark.parametrize("answerer", ["gpt", "assistant", "chatgpt", "bot", "model"])
def test_sharegpt_roles_have_many_names(role: str, answerer: str) -> None:
    record = {"conversations": [{"from": role, "value": "ask"}, {"from": answerer, "value": "answer"}]}
    assert normalise("sharegpt", record, "record 1") == EXPECTED


def test_a_conversation_keeps_what_came_before_as_history() -> None:
    talk = [{"role": "system", "content": "s"}, *turns("q1", "a1", "q2", "a2", "q3")]
    assert conversation(talk) == {
        "instruction": "q2",
        "context": "",
        "response": "a2",
        "history": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": "q1"},
            {"role": "assistant", "content": "a1"},
        ],
    }


@pytest.mark.parametrize(
    "talk",
    [
        [],
        turns("alone"),
        turns("answer first", roles=("assistant",)),
        turns("s", "a", roles=("system", "assistant")),
        turns("q", "a", "b", roles=("user", "assistant", "assistant")),
    ],
)
def test_a_conversation_that_ends_in_no_question_and_answer_has_no_response(talk: list[dict[str, str]]) -> None:
    assert conversation(talk)["response"] == ""


def test_missing_conversations_and_null_turns_count_as_empty() -> None:
    assert normalise("messages", {"messages": None}, "record 1")["response"] == ""
    silent = [{"role": "user", "content": "call it"}, {"role": "assistant", "content": None}]
    assert normalise("messages", {"messages": silent}, "record 1")["response"] == ""


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(max_size=4)), max_size=8))
def test_a_conversation_is_a_prefix_of_its_turns(talk: list[tuple[str, str]]) -> None:
    given_turns = [{"role": role, "content": text} for role, text in talk]
    mapped = conversation(given_turns)
    if mapped["instruction"] or mapped["response"] or mapped["history"]:
        rebuilt = [*mapped["history"], *turns(mapped["instruction"], mapped["response"])]
        assert rebuilt == given_turns[: len(rebuilt)]
        assert all(turn["role"] != "assistant" for turn in given_turns[len(rebuilt) :])
