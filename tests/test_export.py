"""Export: an adapter in the base's weights computes what the adapter does; runs give both kinds of folder."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from builders import FAMILY_VARIANTS, SPARSE_VARIANTS, save_tiny_family, save_tiny_model, token_ids, whole_adapter
from commands import invoke, start
from federations import config as federation
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import emberfed
from emberfed import assembly
from emberfed import config as configuration
from emberfed.checkpoint import RunFolder
from emberfed.clients import Budget
from emberfed.errors import ConfigError, Interrupted, ModelError, RunFolderError, StorageError
from emberfed.models import expert_tuning, lora, merging, peft_layout
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.loading import load
from emberfed.models.tuning_layout import Rows
from emberfed.training import Trainer

ALPHA = 7.0
Tensors = dict[str, torch.Tensor]
# PEFT 0.21 asks transformers 5.23 a question that transformers deprecates; it is not ours to answer.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def loaded(folder: Path, **options: Any) -> FoundationModel:
    return load(ModelConfig(path=str(folder), device="cpu", **options))[0]


def adapter(model: FoundationModel) -> Tensors:
    """A random adapter of everything the model has, none of its values zero."""
    generator = torch.Generator().manual_seed(0)
    fresh = lora.initial(model, whole_adapter(model), generator)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = lm(input_ids=token_ids(2, 10)).logits
    return result


def reopened(folder: Path) -> torch.Tensor:
    """What plain transformers computes with a folder; nothing in it may be missing or left over."""
    lm, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return logits(lm)


@pytest.mark.parametrize("name", [name for names in FAMILY_VARIANTS.values() for name in names])
def test_a_merged_checkpoint_computes_what_the_adapter_does(name: str, tmp_path: Path) -> None:
    base = save_tiny_family(name, tmp_path / "base")
    model, tokenizer = load(ModelConfig(path=str(base), device="cpu"))
    tensors = adapter(model)
    kept = {key: value.clone() for key, value in tensors.items()}
    plain = logits(model.lm)
    with lora.attached(model, tensors, ALPHA):
        expected = logits(model.lm)
    merging.merge_into(model, tensors, ALPHA)
    torch.testing.assert_close(logits(model.lm), expected, rtol=1e-5, atol=1e-5)
    merging.write_checkpoint(model, tokenizer, tmp_path / "merged")
    torch.testing.assert_close(reopened(tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 0.01
    assert all(torch.equal(tensors[key], kept[key]) for key in kept)


def test_merging_by_hand(tiny_model_folder: Path) -> None:
    model, before = loaded(tiny_model_folder), loaded(tiny_model_folder).lm.state_dict()
    tensors = {name: value for name, value in adapter(model).items() if "1.experts.up_proj" in name}
    merging.merge_into(model, tensors, ALPHA)
    a, b = tensors["layers.1.experts.up_proj.lora_A"], tensors["layers.1.experts.up_proj.lora_B"]
    for name, after in model.lm.state_dict().items():
        expected = before[name].clone()
        if name == "model.layers.1.mlp.experts.gate_up_proj":
            for expert in range(8):
                expected[expert, 16:] += ALPHA / 3 * (b[expert] @ a[expert])
        torch.testing.assert_close(after, expected, rtol=1e-6, atol=1e-6)
        assert "layers.1.mlp.experts.gate_up" in name or torch.equal(after, before[name])


def test_merging_rounds_once_to_the_type_of_the_base(tiny_model_folder: Path, tmp_path: Path) -> None:
    exact, (half, tokenizer) = (
        loaded(tiny_model_folder),
        load(ModelConfig(path=str(tiny_model_folder), device="cpu", dtype="bfloat16")),
    )
    tensors = adapter(exact)
    exact.lm.to(torch.bfloat16).to(torch.float32)
    merging.merge_into(exact, tensors, ALPHA)
    merging.merge_into(half, tensors, ALPHA)
    wanted = exact.lm.state_dict()
    for name, value in half.lm.state_dict().items():
        assert value.dtype == torch.bfloat16
        torch.testing.assert_close(value, wanted[name].to(torch.bfloat16))
    merging.write_checkpoint(half, tokenizer, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


class _Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes how many numbers the largest float32 tensor has that is computed inside."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.numbers = max(self.numbers, result.numel())
        return result


def test_a_16_bit_base_is_merged_one_expert_at_a_time(tiny_model_folder: Path) -> None:
    model = loaded(tiny_model_folder, dtype="bfloat16")
    tensors = {name: value for name, value in adapter(model).items() if lora.is_expert(name)}
    with _Largest() as largest:  # type: ignore[no-untyped-call]
        merging.merge_into(model, tensors, ALPHA)
    stack, adapted = 8 * 16 * 32, max(value.numel() for value in tensors.values())
    assert 16 * 32 <= largest.numbers <= max(16 * 32, adapted) < stack


def test_generation_defaults_and_tokenizer_stay(tiny_model_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load(ModelConfig(path=str(tiny_model_folder), device="cpu"))
    merging.write_checkpoint(model, tokenizer, tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == 1
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_what_cannot_be_merged(tiny_model_folder: Path, tmp_path: Path) -> None:
    model = loaded(tiny_model_folder)
    tensors = adapter(model)
    with pytest.raises(ModelError, match="has no place"):
        merging.merge_into(model, tensors | {"layers.9.router.weight": torch.zeros(8, 32)}, ALPHA)
    quantised = loaded(tiny_model_folder, expert_bits=8)
    with pytest.raises(ModelError, match=r"quantised base cannot be merged with; load the base unquantised"):
        merging.merge_into(quantised, tensors, ALPHA)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not write"):
        merging.write_checkpoint(model, load(ModelConfig(path=str(tiny_model_folder)))[1], tmp_path / "file" / "below")


# Runs.


@pytest.fixture(scope="module")
def run_folder(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds. Do not write to it."""
    values = federation(tiny_model_folder, tiny_data, adapter={"rank": 2, "alpha": 4, "router": True})
    return emberfed.run(values, output=tmp_path_factory.mktemp("runs") / "a").path


def of_round(run: Path, base: Path, round: int) -> torch.Tensor:
    folder = run / "rounds" / f"{round:04d}"
    return logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder))


def test_the_adapter_of_a_run(run_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    written = emberfed.export(run_folder, output=tmp_path / "new" / "adapter")
    assert written == tmp_path / "new" / "adapter"
    names = {"adapter_config.json", "adapter_model.safetensors"}
    assert {path.name for path in written.iterdir()} == names
    for name in names:
        assert (written / name).read_bytes() == (run_folder / "rounds" / "0002" / name).read_bytes()
    assert [path.name for path in written.parent.iterdir()] == ["adapter"]
    earlier = emberfed.export(run_folder, output=tmp_path / "earlier", format="peft", round=1)
    found = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model_folder), earlier))
    assert torch.equal(found, of_round(run_folder, tiny_model_folder, 1))
    assert not torch.equal(found, of_round(run_folder, tiny_model_folder, 2))


def test_a_run_merged(run_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")}
    (tmp_path / "empty").mkdir()
    written = emberfed.export(run_folder, output=tmp_path / "empty", format="merged")
    expected = of_round(run_folder, tiny_model_folder, 2)
    torch.testing.assert_close(reopened(written), expected, rtol=1e-5, atol=1e-5)
    assert (expected - reopened(tiny_model_folder)).abs().max() > 1e-3
    assert {path.name for path in tmp_path.iterdir()} == {"empty"}
    assert {path: path.stat().st_mtime_ns for path in run_folder.rglob("*")} == before


def test_a_run_with_a_quantised_base_is_merged_into_the_whole_one(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = federation(tiny_model_folder, tiny_data, training={"rounds": 1})
    values["model"]["expert_bits"] = 8
    run = emberfed.run(values, output=tmp_path / "run").path
    written = emberfed.export(run, output=tmp_path / "merged", format="merged")
    torch.testing.assert_close(reopened(written), of_round(run, tiny_model_folder, 1), rtol=1e-5, atol=1e-5)


def test_a_run_goes_on_from_the_adapter_of_another(
    run_folder: Path, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    start = emberfed.export(run_folder, output=tmp_path / "start")
    values = federation(
        tiny_model_folder,
        tiny_data,
        adapter={"rank": 2, "alpha": 4, "router": True, "start_from": str(start)},
        training={"rounds": 1},
    )
    first = emberfed.export(emberfed.run(values, output=tmp_path / "run").path, output=tmp_path / "first", round=0)
    for name in (peft_layout.CONFIG_FILE, peft_layout.TENSORS_FILE):
        assert (first / name).read_bytes() == (start / name).read_bytes()


# Runs that trained few experts.


def deployed(run: Path, checked: Any) -> torch.Tensor:
    """Logits of a run's newest round at the native K, as the method runs it."""
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    latest = RunFolder.open(run).latest()
    assert latest is not None
    _, state, _ = latest
    budget = Budget("native", material.model.native_top_k)
    with method.deploy(state, material.model, budget) as model:
        return logits(model.lm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "tune", "storage"),
    [("flux", "full", "memory"), ("fmes", "full", "disk"), ("flux", "lora", "disk"), ("fmd", None, "disk")],
)
def test_a_run_of_few_experts_merged(
    method: str, tune: str | None, storage: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    values = federation(tiny_model_folder, tiny_data, method={"name": method}, training={"rounds": 1})
    values["adapter"] = {"tune": "full"} if tune == "full" else values["adapter"]
    values["model"]["expert_storage"] = storage
    run = emberfed.run(values, output=tmp_path / "run").path
    expected = deployed(run, configuration.parse(values))
    written = emberfed.export(run, output=tmp_path / "merged", format="merged")
    torch.testing.assert_close(reopened(written), expected, rtol=1e-5, atol=1e-5)
    assert (expected - reopened(tiny_model_folder)).abs().max() > 1e-3
    if tune == "full":
        own = emberfed.export(run, output=tmp_path / "own")
        assert [path.name for path in own.iterdir()] == ["experts.safetensors"]
        assert (own / "experts.safetensors").read_bytes() == (run / "rounds/0001/experts.safetensors").read_bytes()
        with pytest.raises(
            ConfigError, match=r"trained experts in full \(adapter\.tune\), which PEFT has no format for"
        ):
            emberfed.export(run, output=tmp_path / "peft", format="peft")
        before = emberfed.export(run, output=tmp_path / "before", format="merged", round=0)
        assert torch.equal(reopened(before), reopened(tiny_model_folder))


def full_experts(model: FoundationModel, rows: Rows) -> Tensors:
    """Random weights of some experts, about as large as the model's."""
    generator = torch.Generator().manual_seed(3)
    fresh = expert_tuning.initial(model, rows, "full", 1, generator)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}


@pytest.mark.parametrize("name", [name for names in SPARSE_VARIANTS.values() for name in names])
def test_experts_trained_in_full_take_the_place_of_the_bases(name: str, tmp_path: Path) -> None:
    """In every family's layout: the checkpoint computes what the model does with the experts replaced for a while."""
    base = save_tiny_family(name, tmp_path / "base")
    model, tokenizer = load(ModelConfig(path=str(base), device="cpu"))
    layers = [block.layer for block in model.blocks]
    rows = {layers[0]: (0, 2), layers[-1]: (1,)}
    tensors, plain = full_experts(model, rows), logits(model.lm)
    with expert_tuning.replaced(model, tensors, rows):
        expected = logits(model.lm)
    merging.replace_experts(model, tensors, rows)
    assert torch.equal(logits(model.lm), expected)
    assert (expected - plain).abs().max() > 1e-3
    merging.write_checkpoint(model, tokenizer, tmp_path / "merged")
    torch.testing.assert_close(reopened(tmp_path / "merged"), expected, rtol=1e-5, atol=1e-5)


def test_replaced_experts_are_rounded_once(tiny_model_folder: Path) -> None:
    rows = {0: (1, 6)}
    exact, half = loaded(tiny_model_folder), loaded(tiny_model_folder, dtype="bfloat16")
    tensors = full_experts(exact, rows)
    merging.replace_experts(half, tensors, rows)
    experts: Any = half.blocks[0].experts
    for place, expert in enumerate(rows[0]):
        gate, up, down = (tensors[f"layers.0.experts.{name}_proj.weight"][place] for name in ("gate", "up", "down"))
        assert torch.equal(experts.gate_up_proj[expert], torch.cat([gate, up]).bfloat16())
        assert torch.equal(experts.down_proj[expert], down.bfloat16())


def test_experts_that_cannot_be_replaced(tiny_model_folder: Path) -> None:
    model = loaded(tiny_model_folder)
    tensors = full_experts(model, {0: (1,)})
    quantised, on_disk = loaded(tiny_model_folder, expert_bits=8), loaded(tiny_model_folder, expert_storage="disk")
    for base, why in ((quantised, "quantised base cannot be merged"), (on_disk, "on disk cannot be merged")):
        with pytest.raises(ModelError, match=why):
            merging.replace_experts(base, tensors, {0: (1,)})
    with pytest.raises(ModelError, match="no expert of layer 0 is said to be tuned"):
        merging.replace_experts(model, tensors, {})
    factors = expert_tuning.initial(model, {0: (1,)}, "lora", 2, torch.Generator())
    with pytest.raises(ModelError, match="is LoRA, which takes the place of no weights; merge it instead"):
        merging.replace_experts(model, factors, {0: (1,)})


def test_nothing_is_overwritten_or_left_behind(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine")
    formats: tuple[Literal["peft", "merged"], ...] = ("peft", "merged")
    for format in formats:
        with pytest.raises(RunFolderError, match="exists and is not an empty folder"):
            emberfed.export(run_folder, output=tmp_path / "taken", format=format)
    with pytest.raises(ConfigError, match=r"export format 'onnx' is unknown; there are 'adapter', 'merged' and 'peft'"):
        emberfed.export(run_folder, output=tmp_path / "new", format="onnx")  # type: ignore[arg-type]
    with pytest.raises(RunFolderError, match=r"has no round 7; it has 0, 1, 2"):
        emberfed.export(run_folder, output=tmp_path / "new", round=7)
    with pytest.raises(RunFolderError, match="not a run folder"):
        emberfed.export(tmp_path / "taken", output=tmp_path / "new")
    assert {path.name for path in tmp_path.rglob("*")} == {"taken", "note.txt"}


def test_into_the_working_folder(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    with contextlib.chdir(tmp_path / "here"):
        written = emberfed.export(run_folder, output=".")
    assert written == tmp_path / "here"
    assert (tmp_path / "here" / peft_layout.TENSORS_FILE).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_places_where_no_folder_can_be(run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    places = {
        tmp_path / "link": "exists and is not an empty folder",
        tmp_path / ("x" * 300): "cannot be a folder",
        tmp_path / ("x" * 300) / "below": "cannot be a folder",
        tmp_path / "nul\0": "cannot be a folder",
    }
    for place, message in places.items():
        with pytest.raises(RunFolderError, match=message) as raised:
            emberfed.export(run_folder, output=place, format="merged")
        assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "link"}


def test_not_among_the_rounds_of_a_run(run_folder: Path, tmp_path: Path) -> None:
    before = sorted(run_folder.rglob("*"))
    (tmp_path / "link").symlink_to(run_folder / "rounds")
    for place in (run_folder / "rounds" / "0003", run_folder / "rounds" / "a" / "b", tmp_path / "link" / "0003"):
        with pytest.raises(ConfigError, match="lies among the rounds of the run"):
            emberfed.export(run_folder, output=place)
    assert sorted(run_folder.rglob("*")) == before
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="lies among the rounds of the run"):
        emberfed.export(run_folder, output=tmp_path / "begun" / "rounds")
    assert emberfed.export(run_folder, output=tmp_path / "rounds" / "1").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_export_leaves_nothing(run_folder: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = start("export", run_folder, "--output", tmp_path / "new", "--format", "merged")
    while not list(tmp_path.glob(".new.*.tmp")):
        assert process.poll() is None, process.communicate()
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert process.returncode == Interrupted.exit_code
    assert (out, err) == ("", "emberfed: stopped\n")
    assert not list(tmp_path.iterdir())


def copied(run: Path, target: Path) -> Path:
    for path in run.rglob("*"):
        if path.is_file() and "final" not in path.parts:
            (target / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (target / path.relative_to(run)).write_bytes(path.read_bytes())
    return target


def test_damaged_rounds(run_folder: Path, tmp_path: Path) -> None:
    run = copied(run_folder, tmp_path / "run")
    round = run / "rounds" / "0002"
    tensors = round / peft_layout.TENSORS_FILE
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    with pytest.raises(RunFolderError, match=r"adapter_model\.safetensors is damaged or gone; export another round"):
        emberfed.export(run, output=tmp_path / "new")
    tensors.unlink()
    with pytest.raises(RunFolderError, match="is damaged or gone"):
        emberfed.export(run, output=tmp_path / "new")
    state = json.loads((round / "state.json").read_text())
    del state["sha256"][peft_layout.TENSORS_FILE]
    for written in (json.dumps(state), "[]"):
        (round / "state.json").write_text(written)
        with pytest.raises(RunFolderError, match="round 2 of .* has no PEFT adapter"):
            emberfed.export(run, output=tmp_path / "new")
    for whole in (round, round.with_name("0001"), round.with_name("0000")):
        whole.rename(whole.with_name(f"{whole.name}.partial"))
    with pytest.raises(RunFolderError, match="holds no whole round yet; go on with `emberfed resume"):
        emberfed.export(run, output=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_command(run_folder: Path, tmp_path: Path) -> None:
    answer = invoke("export", run_folder, "--output", tmp_path / "a", "--format", "merged", "--round", "1", "--json")
    assert answer.exit_code == 0, answer.output
    document = json.loads(answer.stdout)
    assert document == {"run": str(run_folder), "format": "merged", "output": str(tmp_path / "a")}
    assert (tmp_path / "a" / "config.json").is_file()
    spoken = invoke("export", run_folder, "--output", tmp_path / "b")
    assert spoken.stdout == f"adapter written to {tmp_path / 'b'}\n"
    refused = invoke("export", run_folder, "--output", tmp_path / "b", "--json")
    assert refused.exit_code == RunFolderError.exit_code
    assert "not an empty folder" in json.loads(refused.stdout)["error"]
    assert invoke("export", run_folder, "--output", tmp_path / "c", "--format", "onnx").exit_code == 2
    assert "Example: emberfed export" in invoke("export", "--help").stdout


def test_all_files_of_a_merged_checkpoint_have_the_users_mode(run_folder: Path, tmp_path: Path) -> None:
    merged = emberfed.export(run_folder, output=tmp_path / "merged", format="merged")
    plain = tmp_path / "plain"
    plain.touch()
    assert {path.stat().st_mode for path in merged.iterdir()} == {plain.stat().st_mode}


def test_merging_onto_another_base_is_refused(run_folder: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(run_folder, tmp_path / "run"))
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"]["path"] = str(save_tiny_model(tmp_path / "other", seed=1))
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(RunFolderError, match=r"base model is not the one .* \(sha256 differ\)"):
        emberfed.export(run, output=tmp_path / "merged", format="merged")
    assert not (tmp_path / "merged").exists()
