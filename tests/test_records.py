from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emberfed.errors import RunFolderError
from emberfed.records import Bundle, Payload, Rank, TensorSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool]
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def bundles(draw: st.DrawFn) -> Bundle:
    names = draw(st.lists(st.text("abc.é_0", min_size=1, max_size=6), max_size=4, unique=True))
    tensors = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 3), max_size=3))
        values = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        tensors[name] = (values * 5).to(draw(st.sampled_from(DTYPES)))
    return Bundle(tensors, draw(st.dictionaries(st.text(), JSON, max_size=3)))


def same(one: Bundle, other: Bundle) -> bool:
    return (
        dict(one.meta) == dict(other.meta)
        and set(one.tensors) == set(other.tensors)
        and all(
            one.tensors[name].dtype == other.tensors[name].dtype and torch.equal(one.tensors[name], other.tensors[name])
            for name in one.tensors
        )
    )


@given(bundles())
def test_a_bundle_comes_back_as_it_was(bundle: Bundle) -> None:
    data = bundle.to_bytes()
    assert same(Bundle.from_bytes(data), bundle)
    shuffled = Bundle(dict(reversed(list(bundle.tensors.items()))), dict(reversed(list(bundle.meta.items()))))
    assert shuffled.to_bytes() == data


@given(bundles(), st.integers(0, 10**6), st.text())
def test_a_payload_comes_back_as_it_was(bundle: Bundle, round: int, client: str) -> None:
    payload = Payload.from_bytes(Payload(round, client, bundle).to_bytes())
    assert (payload.round, payload.client) == (round, client)
    assert same(payload.content, bundle)


def test_a_lazy_bundle_reads_fresh_copies(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    path.write_bytes(Payload(3, "c1", Bundle({"x": torch.ones(2), "y": torch.zeros(1)}, {"k": 1})).to_bytes())
    lazy = Payload.open(path)
    assert (lazy.round, lazy.client, dict(lazy.content.meta), list(lazy.content.tensors)) == (
        3,
        "c1",
        {"k": 1},
        ["x", "y"],
    )
    lazy.content.tensors["x"].zero_()
    assert lazy.content.tensors["x"].tolist() == [1.0, 1.0]
    assert len(lazy.content.tensors) == 2
    with pytest.raises(KeyError):
        lazy.content.tensors["z"]


def test_writing_into_a_result_does_not_reach_the_source() -> None:
    source = torch.ones(2)
    copy = Bundle.from_bytes(Bundle({"x": source}).to_bytes())
    copy.tensors["x"].zero_()
    assert source.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("data", [b"", b"x", b"\x00" * 100, Bundle({"x": torch.ones(3)}).to_bytes()[:-2]])
def test_other_bytes_are_refused_in_one_line(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="not a bundle") as caught:
        Bundle.from_bytes(data)
    assert "\n" not in str(caught.value)
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(RunFolderError, match="not a readable bundle"):
        Bundle.open(path)


def test_a_bundle_without_a_payload_s_header_is_no_payload(tmp_path: Path) -> None:
    for meta in ({}, {"round": "1", "client": "c", "meta": {}}, {"round": 1, "client": 2, "meta": {}}, {"round": True}):
        data = Bundle({}, meta).to_bytes()
        with pytest.raises(RunFolderError, match="not a payload"):
            Payload.from_bytes(data)


def test_numbers_that_json_lacks_are_refused_both_ways() -> None:
    with pytest.raises(ValueError, match="JSON"):
        Bundle({}, {"loss": float("nan")}).to_bytes()
    good = Bundle({}, {"loss": 1.5}).to_bytes()
    assert b"1.5" in good
    with pytest.raises(RunFolderError, match="NaN is not JSON"):
        Bundle.from_bytes(good.replace(b"1.5", b"NaN"))
    with pytest.raises(RunFolderError, match="expected a JSON object"):
        Bundle.from_bytes(_with_meta("[]"))


def _with_meta(text: str) -> bytes:
    header = json.dumps({"__metadata__": {"meta": text}}).encode()
    return len(header).to_bytes(8, "little") + header


def test_specs() -> None:
    assert TensorSpec.of(torch.ones(2, 3)).problem(torch.zeros(2, 3)) is None
    assert TensorSpec((2, Rank(1, 4)), torch.float32).problem(torch.zeros(2, 4)) is None
    for tensor, words in [
        (torch.zeros(2, 5), "shape"),
        (torch.zeros(2, 0), "shape"),
        (torch.zeros(2), "shape"),
        (torch.zeros(1, 3), "shape"),
        (torch.zeros(2, 3, dtype=torch.float64), "dtype"),
    ]:
        problem = TensorSpec((2, Rank(1, 4)), torch.float32).problem(tensor)
        assert problem is not None
        assert problem.startswith(words)
