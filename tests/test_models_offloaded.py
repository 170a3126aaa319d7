"""Experts on disk: the same numbers to the bit, in little memory, from files that nobody has to clear away."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import (
    SPARSE_VARIANTS,
    save_tiny_family,
    save_tiny_model,
    tiny_lm,
    tiny_tokenizer,
    token_ids,
    whole_adapter,
)
from federations import config as federation
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import emberfed
from emberfed import config as configuration
from emberfed.errors import ConfigError, ModelError, StorageError
from emberfed.models import lora, merging, peft_layout
from emberfed.models.config import ModelConfig
from emberfed.models.fingerprint import fingerprint
from emberfed.models.footprint import memory_by_module, parameter_count
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load_model
from emberfed.models.offloaded import OffloadedWeight, disk_bytes_read, offload_experts
from emberfed.models.quantised import quantise_experts
from emberfed.models.stacked import EXPERT_WEIGHTS
from emberfed.provenance import fixed_settings

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def loaded(folder: Path, **options: Any) -> FoundationModel:
    return load_model(ModelConfig.model_validate({"path": str(folder), "device": "cpu", **options}))


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def open_files(folder: Path) -> list[str]:
    """What this process has open there, with or without a name."""
    return [target for target in targets(Path("/proc/self/fd")) if target.startswith(str(folder))]


def targets(links: Path) -> list[str]:
    found = []
    for link in links.iterdir():
        with suppress(FileNotFoundError):  # the listing's own
            found.append(str(link.readlink()))
    return found


# One weight.


@given(
    st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    st.sampled_from(DTYPES),
    st.booleans(),
    st.integers(0, 9),
)
def test_what_is_read_is_what_was_written(
    shape: tuple[int, int, int], dtype: torch.dtype, transposed: bool, seed: int
) -> None:
    stack = drawn(*shape, dtype=dtype, seed=seed)
    stack = stack.transpose(1, 2) if transposed else stack
    before = stack.clone()
    weight = OffloadedWeight.write(stack)
    assert (weight.shape, weight.dtype, weight.numel()) == (stack.shape, dtype, stack.numel())
    assert (weight.nbytes, weight.disk_bytes) == (0, stack.nbytes)
    for index in (*range(shape[0]), -1):
        assert torch.equal(weight.expert(index, dtype), stack[index])
        assert torch.equal(weight.expert(index, torch.float32), stack[index].float())
    assert torch.equal(weight.dequantised(torch.float32), stack.float())
    assert torch.equal(stack, before)


def test_bytes_read_are_counted() -> None:
    """Experts of 3 x 5 numbers in 2 bytes: 30 bytes each, of which there are 4."""
    weight = OffloadedWeight.write(drawn(4, 3, 5, dtype=torch.bfloat16))
    assert weight.bytes_read == 0
    weight.expert(2, torch.float32)
    weight.expert(2, torch.bfloat16)
    assert weight.bytes_read == 60
    weight.dequantised(torch.float32)
    assert weight.bytes_read == 60 + 120


@given(st.lists(st.integers(0, 4), unique=True, max_size=5), st.sampled_from(DTYPES))
def test_experts_that_are_held_are_read_once(held: list[int], dtype: torch.dtype) -> None:
    """5 experts of 2 x 3 numbers: the bits are the same, and only those on disk count when they are asked for."""
    stack = drawn(5, 2, 3, dtype=dtype)
    weight, size = OffloadedWeight.write(stack), 6 * dtype.itemsize
    with weight.holding(held):
        assert (weight.bytes_read, weight.nbytes) == (len(held) * size, len(held) * size)
        for index in range(-5, 5):
            weight.expert(index, dtype).zero_()
            assert torch.equal(weight.expert(index, dtype), stack[index])
            assert torch.equal(weight.expert(index, torch.float64), stack[index].double())
        assert weight.bytes_read == (len(held) + 6 * (5 - len(held))) * size
        assert torch.equal(weight.dequantised(dtype), stack)
    assert weight.nbytes == 0
    before = weight.bytes_read
    assert torch.equal(weight.dequantised(dtype), stack)
    assert weight.bytes_read == before + 5 * size


def test_what_is_held_ends_with_its_context() -> None:
    """Also inside another one; an expert that is not there leaves all as it was."""
    weight = OffloadedWeight.write(drawn(4, 3, 5))
    with weight.holding([0, 1]):
        with weight.holding([3]):
            assert weight.nbytes == 60
        assert weight.nbytes == 120
        with pytest.raises(IndexError), weight.holding([2, 4]):
            pass
        read = weight.bytes_read
        assert torch.equal(weight.expert(1, torch.float32), drawn(4, 3, 5)[1])
        assert weight.bytes_read == read
    assert weight.nbytes == 0


@pytest.mark.parametrize("index", [4, -5])
def test_an_expert_there_is_none_of(index: int) -> None:
    weight = OffloadedWeight.write(drawn(4, 3, 5))
    with pytest.raises(IndexError):
        weight.expert(index, torch.float32)
    assert weight.bytes_read == 0


def test_an_expert_that_is_read_belongs_to_the_reader() -> None:
    weight = OffloadedWeight.write(drawn(2, 3, 5))
    weight.expert(0, torch.float32).zero_()
    assert torch.equal(weight.expert(0, torch.float32), drawn(2, 3, 5)[0])


def test_threads_read_beside_each_other() -> None:
    stack = drawn(8, 64, 64)
    weight = OffloadedWeight.write(stack)
    indices = [index % 8 for index in range(400)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda index: weight.expert(index, torch.float32), indices))
    assert all(torch.equal(matrix, stack[index]) for index, matrix in zip(indices, found, strict=True))
    assert weight.bytes_read == 400 * 64 * 64 * 4


def test_it_says_what_it_is() -> None:
    assert str(OffloadedWeight.write(drawn(2, 3, 5).half())) == "OffloadedWeight((2, 3, 5), float16 on disk)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value: float, temporary: Path) -> None:
    stack = drawn(2, 3, 5)
    stack[1, 2, 0] = value
    with pytest.raises(ModelError, match="the weight holds values that are not finite in float32"):
        OffloadedWeight.write(stack, "the weight")
    assert not open_files(temporary)


# Its file.


@linux
def test_the_file_has_no_name_and_goes_with_the_weight(temporary: Path) -> None:
    weight = OffloadedWeight.write(drawn(2, 3, 5))
    assert len(open_files(temporary)) == 1
    assert not list(temporary.iterdir())
    del weight
    gc.collect()
    assert not open_files(temporary)


@contextmanager
def files_of_at_most(size_bytes: int) -> Iterator[None]:
    """A disk with that much room for each file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@linux
def test_a_disk_that_is_full(temporary: Path) -> None:
    expected = f"the weight of 120 bytes cannot be written to a file in {temporary}: {os.strerror(errno.EFBIG)}; make"
    with files_of_at_most(100), pytest.raises(StorageError, match=expected):
        OffloadedWeight.write(drawn(2, 3, 5), "the weight")
    assert not open_files(temporary)


@linux
def test_loading_onto_a_disk_that_is_full(tiny_model_folder: Path, temporary: Path) -> None:
    """Gate and up of all experts take 8 x 32 x 32 numbers of 4 bytes."""
    with files_of_at_most(30_000), pytest.raises(StorageError) as raised:
        loaded(tiny_model_folder, expert_storage="disk")
    told = str(raised.value)
    weight = "weight 'model.layers.0.mlp.experts.gate_up_proj' of 32768 bytes"
    assert told.startswith(f"model {tiny_model_folder}: {weight} cannot be written to a file in {temporary}: ")
    assert "set TMPDIR to a folder on a larger disk" in told
    assert "\n" not in told
    del raised  # its frames hold the weights that were read before
    gc.collect()
    assert not open_files(temporary)


def test_a_folder_for_temporary_files_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(StorageError, match=r"cannot be written to a file in .*gone: No such file"):
        OffloadedWeight.write(drawn(2, 3, 5))


def test_a_file_that_was_cut_short() -> None:
    file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - the weight takes it over
    file.write(bytes(60 + 20))
    weight = OffloadedWeight(file, torch.Size((2, 3, 5)), torch.float32, torch.device("cpu"), "the weight")
    assert torch.equal(weight.expert(0, torch.float32), torch.zeros(3, 5))
    with pytest.raises(StorageError, match="expert 1 of the weight cannot be read back .*: the file is shorter than"):
        weight.expert(1, torch.float32)


_HOLD = """
import sys
from pathlib import Path
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load_model
model = load_model(ModelConfig(path=sys.argv[1], device="cpu", expert_storage="disk"))
print("loaded", flush=True)
sys.stdin.read(1)
"""


@linux
def test_nothing_is_left_behind_by_a_process_that_is_killed(tiny_model_folder: Path, temporary: Path) -> None:
    environment = os.environ | {"TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(tiny_model_folder)],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "loaded\n"
        assert sum(target.startswith(str(temporary)) for target in targets(Path(f"/proc/{child.pid}/fd"))) == 4
        child.kill()
    assert child.returncode == -signal.SIGKILL
    assert not list(temporary.iterdir())


# A model.


def trained(model: FoundationModel, top_k: int) -> dict[str, torch.Tensor]:
    """Logits with a noisy adapter attached, and the gradient of each of its tensors."""
    generator = torch.Generator().manual_seed(5)
    values = lora.initial(model, whole_adapter(model), generator)
    tensors = {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in values.items()}
    ids = token_ids(3, 10)
    with lora.attached(model, tensors, alpha=6) as adapter, model.active_experts(top_k):
        output = model.lm(input_ids=ids, labels=ids)
        output.loss.backward()
        results = {"logits": output.logits.detach()}
        for name, parameter in adapter.parameters.items():
            assert parameter.grad is not None, name
            results[name] = parameter.grad.to_dense()
    return results


@pytest.mark.parametrize("family", SPARSE_VARIANTS)
def test_logits_and_gradients_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    """Bit for bit, at the native K and at 1."""
    folder = save_tiny_family(family, tmp_path)
    for dtype in ("float32", "bfloat16"):
        in_memory, on_disk = loaded(folder, dtype=dtype), loaded(folder, dtype=dtype, expert_storage="disk")
        stacks = [getattr(block.experts, name) for block in on_disk.blocks for name in EXPERT_WEIGHTS]
        assert all(isinstance(stack, OffloadedWeight) for stack in stacks)
        assert fingerprint(on_disk.lm) == fingerprint(in_memory.lm)
        assert on_disk.shape == in_memory.shape
        for top_k in (on_disk.native_top_k, 1):
            expected, found = trained(in_memory, top_k), trained(on_disk, top_k)
            assert set(found) == set(expected)
            for name, value in expected.items():
                assert torch.equal(found[name], value), name


def test_large_experts_too(tmp_path: Path) -> None:
    """Their products go another way, through oneDNN, from 2^18 weights on."""
    folder = save_tiny_model(tmp_path, hidden_size=512, intermediate_size=512, num_experts=4)
    expected, found = (trained(loaded(folder, expert_storage=storage), 2) for storage in ("memory", "disk"))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_what_a_step_reads() -> None:
    """One position at K = 1 reads one expert in each of 2 layers: gate and up are 32 x 32 numbers, down is 32 x 16.

    Backward reads both again in the upper layer. In the lower one nothing is trained below the experts, so that the
    gradient of their input, which would take gate and up, is not asked for. Without an adapter there is no backward.
    """
    model = FoundationModel(tiny_lm())
    offload_experts(model.lm)
    gate_up, down = 32 * 32 * 4, 32 * 16 * 4
    generator = torch.Generator().manual_seed(0)
    tensors = lora.initial(model, lora.LoraConfig(rank=2, attention=False), generator)
    with model.active_experts(1):
        with torch.no_grad():
            model.lm(input_ids=token_ids(1, 1))
        assert disk_bytes_read(model.lm) == 2 * (gate_up + down)
        with lora.attached(model, tensors, alpha=4):
            model.lm(input_ids=token_ids(1, 1)).logits.sum().backward()
    assert disk_bytes_read(model.lm) == 2 * 2 * (gate_up + down) + (gate_up + down) + down


def test_experts_are_put_on_disk_after_loading_as_while_loading(tiny_model_folder: Path) -> None:
    model, later = loaded(tiny_model_folder, expert_storage="disk"), loaded(tiny_model_folder)
    offload_experts(later.lm)
    assert fingerprint(later.lm) == fingerprint(model.lm)
    assert list(later.lm.state_dict()) == list(model.lm.state_dict())


def test_experts_that_cannot_be_put_on_disk() -> None:
    lm = tiny_lm()
    offload_experts(lm)
    first = r"weight 'model\.layers\.0\.mlp\.experts\.gate_up_proj'"
    for again in (offload_experts, lambda model: quantise_experts(model, 4)):
        with pytest.raises(ModelError, match=f"{first} is kept as float32 on disk already; load the model again"):
            again(lm)
    quantised = tiny_lm()
    quantise_experts(quantised, 4)
    with pytest.raises(ModelError, match=f"{first} is kept as 4 bit already"):
        offload_experts(quantised)
    with pytest.raises(ModelError, match="no stacked expert weights"):
        offload_experts(nn.Linear(8, 8))


def test_a_fingerprint_knows_every_number(tiny_model_folder: Path) -> None:
    model, other = loaded(tiny_model_folder), loaded(tiny_model_folder)
    with torch.no_grad():
        other.lm.model.layers[1].mlp.experts.down_proj[7, 31, 15] += 1e-3
    for each in (model, other):
        offload_experts(each.lm)
    assert fingerprint(model.lm) != fingerprint(other.lm)


def test_what_is_on_disk_takes_no_memory(tiny_model_folder: Path) -> None:
    """2 layers of 8 experts of three matrices, 16 x 32."""
    in_memory, on_disk = loaded(tiny_model_folder), loaded(tiny_model_folder, expert_storage="disk")
    before = {row.module: row for row in memory_by_module(in_memory.lm)}
    after = {row.module: row for row in memory_by_module(on_disk.lm)}
    experts = after.pop("routed experts")
    assert before.pop("routed experts").weights == experts.weights == 2 * 8 * 3 * 16 * 32
    assert (experts.stored_bytes, experts.bits_per_weight, experts.formats) == (0, 0, ("float32 on disk",))
    assert after == before
    assert parameter_count(on_disk.lm) == parameter_count(in_memory.lm)
    on_disk_bytes = sum(module.disk_bytes for module in on_disk.lm.modules() if isinstance(module, OffloadedWeight))
    assert on_disk_bytes == 4 * experts.weights


def test_an_adapter_is_exported_but_not_merged(tiny_model_folder: Path) -> None:
    in_memory, on_disk = loaded(tiny_model_folder), loaded(tiny_model_folder, expert_storage="disk")
    tensors = lora.initial(in_memory, whole_adapter(in_memory), torch.Generator().manual_seed(0))
    assert peft_layout.to_files(tensors, 6.0, on_disk) == peft_layout.to_files(tensors, 6.0, in_memory)
    before = fingerprint(on_disk.lm)
    with pytest.raises(ModelError, match=r"on disk cannot be merged with; .*\(model\.expert_storage=memory"):
        merging.merge_into(on_disk, tensors, 6.0)
    assert fingerprint(on_disk.lm) == before


# Its configuration.


def test_bits_and_disk_do_not_go_together() -> None:
    with pytest.raises(ConfigError, match="expert_bits is 4, but experts on disk .* stay in dtype; set expert_bits to"):
        configuration.load(None, ["model.expert_bits=4", "model.expert_storage=disk"])


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("llama", {}, "llama models are dense and have no experts; set model.expert_storage=memory"),
        ("olmoe", {"weights": "random"}, "only a checkpoint's weights can be kept so; set model.weights=checkpoint"),
    ],
)
def test_models_whose_experts_cannot_be_on_disk(
    family: str, options: dict[str, str], words: str, tmp_path: Path
) -> None:
    folder = save_tiny_family(family, tmp_path)
    with pytest.raises(ModelError, match=f"model {folder}: model.expert_storage is disk, but {words}"):
        loaded(folder, expert_storage="disk", **options)


def test_a_checkpoint_of_codes(tmp_path: Path) -> None:
    file = save_tiny_family("olmoe", tmp_path) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(ModelError, match="quantised already, but model.expert_storage is disk; set model.exp"):
        loaded(tmp_path, expert_storage="disk")


def test_a_run_goes_on_with_experts_where_they_were() -> None:
    """What it computes would be the same, but not what it reads from disk, which is on the clients' clock."""
    in_memory, on_disk = (configuration.load(None, [f"model.expert_storage={where}"]) for where in ("memory", "disk"))
    assert fixed_settings(in_memory) != fixed_settings(on_disk)


def test_a_run_from_disk_is_the_run_from_memory(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """To the byte of what it exports; and it can be merged, into the base in memory."""
    runs = {}
    for storage in ("memory", "disk"):
        values = federation(tiny_model_folder, tiny_data, training={"rounds": 1})
        values["model"]["expert_storage"] = storage
        runs[storage] = emberfed.run(values, output=tmp_path / storage).path
    for name in (peft_layout.CONFIG_FILE, peft_layout.TENSORS_FILE):
        found = [(run / "rounds" / "0001" / name).read_bytes() for run in runs.values()]
        assert found[0] == found[1]
    merged = [
        emberfed.export(run, output=tmp_path / f"{storage}-merged", format="merged") for storage, run in runs.items()
    ]
    first, second = ((folder / "model.safetensors").read_bytes() for folder in merged)
    assert first == second


# Its memory, in processes of their own.


_LIMITED = r"""
import json, re, resource, sys
from pathlib import Path
import torch
from emberfed.models import lora
from emberfed.models.config import ModelConfig
from emberfed.models.loading import load_model
from emberfed.models.offloaded import disk_bytes_read

def step(model):
    generator = torch.Generator().manual_seed(0)
    tensors = lora.initial(model, lora.LoraConfig(rank=2), generator)
    ids = torch.randint(2, 64, (2, 16), generator=generator)
    with lora.attached(model, tensors, alpha=4.0) as adapter:
        optimizer = torch.optim.SGD(adapter.parameters.values(), lr=1.0, foreach=False)
        losses = []
        for _ in range(2):
            loss = model.lm(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses

path, tiny, storage, budget = *sys.argv[1:4], int(sys.argv[4])
step(load_model(ModelConfig(path=tiny, device="cpu", expert_storage="disk")))  # what libraries need once
in_use = int(re.search(r"VmData:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (in_use + budget, in_use + budget))
model = load_model(ModelConfig(path=path, device="cpu", expert_storage=storage))
print(json.dumps({"losses": step(model), "read": disk_bytes_read(model.lm)}))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 0.3 GB in float32, stored in half of that; most of it is experts, 13 MB in the larger stacks."""
    folder = tmp_path_factory.mktemp("large")
    with torch.device("meta"):
        lm = tiny_lm(hidden_size=512, intermediate_size=512, num_experts=6, num_hidden_layers=16)
    lm = lm.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(lm.named_parameters()):
        parameter.data.normal_(std=0.05, generator=generator)
    lm.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.slow
@linux
def test_a_client_trains_experts_that_do_not_fit_its_memory(large: Path, tiny_model_folder: Path) -> None:
    """Beside all other weights there is room for a quarter of the experts, and to map the checkpoint, which counts too.

    glibc is told to give back large blocks when they are freed: the limit would count what it keeps for later.
    """
    experts = 16 * 6 * 3 * 512 * 512 * 4
    stored = (large / "model.safetensors").stat().st_size
    others = 2 * stored - experts
    budget = stored + others + experts // 4

    environment = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}

    def child(storage: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", _LIMITED, str(large), str(tiny_model_folder), storage, str(budget)]
        return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)

    from_disk = child("disk")
    assert from_disk.returncode == 0, from_disk.stderr
    found = json.loads(from_disk.stdout)
    first, second = found["losses"]
    assert first != second
    assert experts // 4 < found["read"] <= 2 * 2 * experts
    from_memory = child("memory")
    assert from_memory.returncode != 0
    assert "memory" in from_memory.stderr
