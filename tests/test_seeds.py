from __future__ import annotations

import os
import subprocess
import sys

import torch
from hypothesis import given
from hypothesis import strategies as st

from emberfed.seeds import Seeds


@given(st.integers(0, 2**40), st.integers(0, 100), st.text(max_size=8))
def test_an_address_always_gives_the_same_stream(seed: int, round: int, client: str) -> None:
    one = Seeds(seed).at(round=round, client=client)
    other = Seeds(seed).at(client=client).at(round=round)
    assert one == other
    assert torch.equal(torch.rand(4, generator=one.torch("order")), torch.rand(4, generator=other.torch("order")))
    assert one.numpy("order").random() == other.numpy("order").random()


def test_every_part_of_the_address_matters() -> None:
    places = [
        Seeds(0),
        Seeds(1),
        Seeds(0).at(round=1),
        Seeds(0).at(round=2),
        Seeds(0).at(round=1, client="c0"),
        Seeds(0).at(round=1, client="c1"),
        Seeds(0).at(round=1, client="c10"),
    ]
    drawn = [place.integer(purpose) for place in places for purpose in ("order", "init")]
    assert len(set(drawn)) == len(drawn)
    assert all(0 <= number < 2**63 for number in drawn)


def test_the_stream_is_the_same_in_another_process() -> None:
    code = "from emberfed.seeds import Seeds; print(Seeds(3).at(round=2, client='c1').integer('order'))"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert outputs == {str(Seeds(3).at(round=2, client="c1").integer("order"))}
