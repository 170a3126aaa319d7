"""Weights in a file that processes map: the same bits, one copy of a page until somebody writes to it."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import FAMILY_VARIANTS, tiny_family_lm, tiny_lm, tiny_model, token_ids
from torch import nn

from emberfed.errors import ModelError
from emberfed.models import merging
from emberfed.models.fingerprint import fingerprint
from emberfed.models.footprint import memory_by_module
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.offloaded import offload_experts
from emberfed.models.quantised import quantise_experts
from emberfed.models.shared_weights import share_weights


@contextmanager
def new_file() -> Iterator[int]:
    with tempfile.TemporaryFile() as file:
        yield file.fileno()


def content(file: int) -> bytes:
    return Path(f"/dev/fd/{file}").read_bytes()


def logits(model: FoundationModel) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model.lm(input_ids=token_ids(2, 7)).logits
    return answer


def mapped(lm: nn.Module) -> list[str]:
    """Names of what is not in memory of torch's own."""
    return [
        name
        for name, weight in lm.state_dict(keep_vars=True).items()
        if weight.numel() and not weight.untyped_storage().resizable()
    ]


@pytest.mark.parametrize("family", sorted(FAMILY_VARIANTS))
def test_every_familys_weights_keep_their_bits(family: str) -> None:
    """In the process that writes and in one that maps; the model computes what it computed."""
    first, second = (FoundationModel(tiny_family_lm(family)) for _ in range(2))
    print_before, before = fingerprint(first.lm), logits(first)
    parameters, memory_before = dict(first.lm.named_parameters()), memory_by_module(first.lm)
    with new_file() as file:
        share_weights(first.lm, file)
        share_weights(second.lm, file)
    for model in (first, second):
        assert fingerprint(model.lm) == print_before
        assert torch.equal(logits(model), before)
        assert memory_by_module(model.lm) == memory_before
        assert mapped(model.lm) == [name for name, weight in model.lm.state_dict().items() if weight.numel()]
    assert all(parameters[name] is parameter for name, parameter in first.lm.named_parameters())
    assert not any(parameter.requires_grad for parameter in first.lm.parameters())


def test_weights_begin_where_torchs_own_do() -> None:
    lm = tiny_lm(num_experts=7, vocab_size=61)
    with new_file() as file:
        share_weights(lm, file)
    weights = list(lm.state_dict().values())
    assert all(weight.data_ptr() % 64 == 0 for weight in weights)
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights), "each has its own"


class _Odd(nn.Module):
    """Weights that lie in memory in every way there is."""

    def __init__(self, draw: torch.Generator) -> None:
        super().__init__()
        self.turned = nn.Parameter(torch.randn(3, 5, generator=draw).t())
        self.cut = nn.Parameter(torch.randn(4, 6, generator=draw)[:, 1:4])
        self.tied = self.cut
        self.none = nn.Parameter(torch.empty(0, 4))
        self.short = nn.Parameter(torch.randn(5, generator=draw).bfloat16())
        self.register_buffer("codes", torch.randint(0, 255, (7, 3), generator=draw, dtype=torch.uint8))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)


def test_strides_ties_and_types_stay() -> None:
    """A transposed weight stays transposed (the products' bits may depend on it); a part of a larger one is cut out."""
    first, second = (_Odd(torch.Generator().manual_seed(1)) for _ in range(2))
    expected = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    with new_file() as file:
        share_weights(first, file)
        share_weights(second, file)
    for odd in (first, second):
        state = odd.state_dict()
        assert list(state) == list(expected)
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
        assert odd.turned.stride() == (1, 5)
        assert odd.cut.stride() == (3, 1)
        assert odd.tied is odd.cut
        assert odd.short.dtype == torch.bfloat16
        assert odd.scratch.untyped_storage().resizable(), "what no checkpoint holds is not shared"  # type: ignore[operator]


def test_who_writes_to_a_weight_writes_to_a_copy() -> None:
    first, second = tiny_model(), tiny_model()
    with new_file() as file:
        share_weights(first.lm, file)
        share_weights(second.lm, file)
        kept, whole = fingerprint(second.lm), content(file)
        with torch.no_grad():
            for parameter in first.lm.parameters():
                parameter.mul_(2)
        assert fingerprint(first.lm) != kept
        assert fingerprint(second.lm) == kept
        assert content(file) == whole


def test_a_base_that_is_merged_with_gets_its_bits_back() -> None:
    """As FLoRA does, in one process while the other computes."""
    model, other = tiny_model(), tiny_model()
    draw = torch.Generator().manual_seed(2)
    name = "layers.0.experts.down_proj"
    tensors = {
        f"{name}.lora_A": torch.randn(8, 2, 16, generator=draw),
        f"{name}.lora_B": torch.randn(8, 32, 2, generator=draw),
    }
    with new_file() as file:
        share_weights(model.lm, file)
        share_weights(other.lm, file)
    before, kept = logits(model), fingerprint(model.lm)
    with merging.merged(model, tensors, alpha=2.0):
        assert not torch.equal(logits(model), before)
        assert torch.equal(logits(other), before)
    assert (fingerprint(model.lm), fingerprint(other.lm)) == (kept, kept)


def test_quantised_experts_are_shared_and_those_on_disk_stay_there() -> None:
    with new_file() as file:
        lm = tiny_lm()
        quantise_experts(lm, 8)
        before = fingerprint(lm)
        share_weights(lm, file)
        assert "model.layers.0.mlp.experts.down_proj.codes" in mapped(lm)
        assert fingerprint(lm) == before
    with new_file() as file:
        lm = tiny_lm()
        experts = sum(weight.nbytes for name, weight in lm.state_dict().items() if ".mlp.experts." in name)
        whole = sum(weight.nbytes for weight in lm.state_dict().values())
        offload_experts(lm)
        before = fingerprint(lm)
        share_weights(lm, file)
        assert fingerprint(lm) == before
        assert len(content(file)) < whole - experts + 64 * 100


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            {"num_experts": 6},
            r"'model.layers.0.mlp.experts.down_proj' is torch.float32 \(6, 32, 16\) in this process, ",
        ),
        ({"num_hidden_layers": 3}, r"'model.layers.2.[a-z_.0-9]+' is torch.float32 .*, but missing in the one"),
        ({"num_hidden_layers": 1}, r"'model.layers.1.[a-z_.0-9]+' is missing in this process, but torch.float32 "),
    ],
)
def test_another_models_weights_are_refused(overrides: dict[str, Any], words: str) -> None:
    other = tiny_lm(**overrides)
    with new_file() as file:
        share_weights(tiny_lm(), file)
        with pytest.raises(ModelError, match=words):
            share_weights(other, file)
    assert mapped(other) == []


def test_a_full_disk_is_one_line_and_the_model_stays_as_it_was() -> None:
    """A limit on the size of files stands in for a full disk: the system refuses the write."""
    code = """
import resource, signal, tempfile
from builders import tiny_lm
from emberfed.errors import StorageError
from emberfed.models.fingerprint import fingerprint
from emberfed.models.shared_weights import share_weights
lm = tiny_lm()
before = fingerprint(lm)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
with tempfile.TemporaryFile() as file:
    try:
        share_weights(lm, file.fileno())
    except StorageError as error:
        print(error)
assert fingerprint(lm) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1
    assert "bytes cannot be shared by a file" in done.stdout
    assert "TMPDIR" in done.stdout


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of memory")
def test_a_process_keeps_no_memory_of_its_own_for_shared_weights() -> None:
    """64 MB in a process that maps what another wrote, also after all weights were used; it then writes a quarter."""
    code = """
import sys, torch
from pathlib import Path
from emberfed.models.shared_weights import share_weights

def own_megabytes():
    account = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line.split()[1] for line in account if line.startswith("Anonymous:"))) / 1000

lm = torch.nn.Sequential(*(torch.nn.Linear(2000, 2000, bias=False) for _ in range(4))).requires_grad_(False)
x = lm(torch.ones(2, 2000))
before = own_megabytes()
share_weights(lm, int(sys.argv[1]))
assert torch.equal(lm(torch.ones(2, 2000)), lm(torch.ones(2, 2000)))
mapped = own_megabytes()
lm[2].weight.mul_(2)
print(before - mapped, own_megabytes() - mapped)
"""
    lm = nn.Sequential(*(nn.Linear(2000, 2000, bias=False) for _ in range(4)))
    with new_file() as file:
        share_weights(lm, file)
        command = [sys.executable, "-c", code, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, pass_fds=[file], check=True)
    freed, written = map(float, done.stdout.split())
    assert freed > 60
    assert 15 < written < 20
