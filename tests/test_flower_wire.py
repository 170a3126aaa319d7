"""What crosses Flower's wire: read as it was written, through Flower's own serialisation, and nothing else accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from hypothesis import given
from hypothesis import strategies as st

from emberfed.errors import RunFolderError
from emberfed.flower.wire import Asked, Description, Hello, answered, as_line, asked, read_answered, read_asked
from emberfed.records import Assessment, Bundle, ClientFailed, Job, Payload, Reply, Survey

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=4)
QUESTIONS = st.builds(
    lambda kind, round, client, data: kind(round, client, data),
    st.sampled_from([Job, Assessment, Survey]),
    NUMBERS,
    TEXTS,
    st.binary(max_size=200),
)
HELLOS = st.builds(Hello, TEXTS, OBJECTS)
MEASURED = st.dictionaries(TEXTS, st.integers(0, 10**15) | st.floats(0, 1e29), max_size=3)
ANSWERS = (
    st.builds(Description, OBJECTS)
    | st.builds(Reply, NUMBERS, TEXTS, st.binary(max_size=200), MEASURED)
    | st.builds(lambda round, client, line: ClientFailed(round, client, as_line(line)), NUMBERS, TEXTS, TEXTS)
)


def sent(content: RecordDict) -> RecordDict:
    """Return what arrives of a content: through bytes, as Flower sends it."""
    return recorddict_from_proto(RecordDictProto.FromString(recorddict_to_proto(content).SerializeToString()))


@given(HELLOS | st.builds(Asked, HELLOS, TEXTS, QUESTIONS))
def test_what_a_server_sends_is_read_as_it_was(message: Hello | Asked) -> None:
    assert read_asked(sent(asked(message))) == message


@given(ANSWERS)
def test_what_a_client_answers_is_read_as_it_was(message: Description | Reply | ClientFailed) -> None:
    assert read_answered(sent(answered(message))) == message


def test_every_dtype_survives() -> None:
    """bfloat16 is one that Flower's own arrays do not have."""
    dtypes = (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes}
    upload = Payload(3, "c1", Bundle(tensors, {"examples": 4})).to_bytes()
    reply = read_answered(sent(answered(Reply(3, "c1", upload, {"seconds": 1.5}))))
    assert isinstance(reply, Reply)
    found = Payload.from_bytes(reply.upload).content.tensors
    assert {name: tensor.dtype for name, tensor in found.items()} == {str(dtype): dtype for dtype in dtypes}
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_payload_adds_little_to_what_crosses() -> None:
    """Of 12 MB, at most 1 % more, in pieces of at most 5 MB and their heads: what Flower's object store takes."""
    upload = bytes(12_000_000)
    content = answered(Reply(3, "c1", upload, {"seconds": 1.0}))
    sizes = [len(piece.deflate()) for piece in get_all_nested_objects(content).values()]
    assert max(sizes) < 5.5e6
    assert (
        sum(len(piece.deflate()) for piece in get_all_nested_objects(answered(Reply(1, "c", b"", {}))).values()) < 5000
    )
    proto = recorddict_to_proto(content).SerializeToString()
    assert len(upload) < len(proto) < 1.01 * len(upload)


def record(**head: Any) -> RecordDict:
    return RecordDict({"emberfed": ConfigRecord(head)})


def with_array(content: RecordDict, data: bytes, stype: str) -> RecordDict:
    array = Array(dtype="uint8", shape=(len(data),), stype=stype, data=data)
    content["payload"] = ArrayRecord({"payload": array})
    return content


REPLY: Mapping[str, Any] = {"kind": "reply", "round": 3, "client": "c1", "body": "{}"}
JOB: Mapping[str, Any] = {**REPLY, "kind": "job", "run": "r", "tier": "t"}


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({"kind": "job"}, "answered with 'job'"),
        ({}, "answered with None"),
        ({"kind": b"reply"}, "answered with b'reply'"),
        ({"kind": ["reply"]}, r"answered with \['reply'\]"),
        ({**REPLY, "round": 3.0}, "'round' is not a whole number"),
        ({**REPLY, "round": True}, "'round' is not a whole number"),
        ({**REPLY, "round": [3]}, "'round' is not a whole number"),
        ({**REPLY, "client": 1}, "'client' is not text"),
        ({**REPLY, "body": "[]"}, "'body' is not a JSON object"),
        ({**REPLY, "body": "{"}, "'body' is not a JSON object"),
        ({**REPLY, "body": b"{}"}, "'body' is not text"),
        ({**REPLY, "body": "[" * 100_000}, "'body' is not a JSON object"),
        ({**REPLY, "body": '{"seconds": "1"}'}, "measurements"),
        ({**REPLY, "body": '{"seconds": true}'}, "measurements"),
        ({**REPLY, "body": '{"seconds": NaN}'}, "measurements"),
        ({**REPLY, "body": '{"seconds": 1e999}'}, "measurements"),
        ({**REPLY, "body": '{"seconds": -1}'}, "measurements"),
        ({**REPLY, "body": '{"seconds": 1' + "0" * 400 + "}"}, "measurements"),
        ({**REPLY, "body": '{"seconds": 1' + "0" * 5000 + "}"}, "'body' is not a JSON object"),
        (REPLY, "without a payload"),
        ({"kind": "failed", "round": 3, "client": "c1"}, "'reason' is not text"),
        ({"kind": "description", "body": "1"}, "'body' is not a JSON object"),
    ],
)
def test_what_no_client_of_ours_answers_is_refused(head: Mapping[str, Any], words: str) -> None:
    with pytest.raises(RunFolderError, match=words):
        read_answered(record(**head))


@pytest.mark.parametrize(
    ("head", "words"),
    [
        ({**JOB, "kind": "reply"}, "asked for 'reply'"),
        ({**JOB, "kind": ["job"]}, r"asked for \['job'\]"),
        ({**JOB, "round": "3"}, "'round' is not a whole number"),
        ({**JOB, "tier": 1}, "'tier' is not text"),
        ({**JOB, "run": 1}, "'run' is not text"),
        (JOB, "without a payload"),
        ({"kind": "hello", "run": "r"}, "'body' is not text"),
    ],
)
def test_what_no_server_of_ours_asks_is_refused(head: Mapping[str, Any], words: str) -> None:
    content = record(**head)
    if "payload" not in words:
        with_array(content, b"download", "emberfed.safetensors")
    with pytest.raises(RunFolderError, match=words):
        read_asked(content)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"emberfed": MetricRecord({"kind": 1})}),
        RecordDict({"emberfed": ArrayRecord()}),
        RecordDict({"other": ConfigRecord({"kind": "reply"})}),
    ],
)
def test_a_message_of_another_program_is_refused(content: RecordDict) -> None:
    for read in (read_asked, read_answered):
        with pytest.raises(RunFolderError, match="does not run emberfed"):
            read(content)


def test_an_array_that_is_no_payload_of_ours_is_refused() -> None:
    """Flower's own arrays are NumPy's files, which may hold pickles; ours are never opened as such."""
    with pytest.raises(RunFolderError, match="without a payload"):
        read_answered(with_array(record(**REPLY), b"x", "numpy.ndarray"))
    reply = read_answered(with_array(record(**REPLY), b"x", "emberfed.safetensors"))
    assert reply == Reply(3, "c1", b"x", {})


@given(
    st.dictionaries(
        st.sampled_from(["kind", "round", "client", "body", "reason", "run", "tier", "x"]),
        st.sampled_from(["reply", "failed", "description", "hello", "job", "assessment", "{}"])
        | TEXTS
        | NUMBERS
        | st.floats()
        | st.booleans()
        | st.binary(max_size=4)
        | st.lists(NUMBERS, max_size=2),
    ),
    st.booleans(),
)
def test_whatever_arrives_is_read_or_refused(head: dict[str, Any], array: bool) -> None:
    """Nothing but a message of ours, or the error that says that it is none; its reason is one line."""
    content = record(**head)
    if array:
        with_array(content, b"data", "emberfed.safetensors")
    for read in (read_asked, read_answered):
        try:
            message: Any = read(content)
        except RunFolderError as error:
            message = str(error)
        assert isinstance(message, Hello | Asked | Description | Reply | ClientFailed) or message.isprintable()


@given(st.text())
def test_a_line_is_one_line_that_can_be_printed(told: str) -> None:
    line = as_line(told)
    assert line.isprintable()
    assert len(line) <= 1003
    assert as_line(line) == line
    if told.isprintable() and len(told) <= 1000:
        assert line == " ".join(told.split())


def test_pages_are_cut() -> None:
    assert as_line("a\x1b[2J\n\tb") == "a [2J b"
    line = as_line("word " * 10**6)
    assert line.startswith("word word word ")
    assert line.endswith("...")
    assert len(line) <= 1003
