"""A sparse adapter's folder: written, read, loaded onto plain transformers models, refused where it does not fit."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import CLASSES, tiny_family_lm
from test_models_sparse_adapter import all_hooks, fresh, inputs, loud, model_of

import emberfed
from emberfed.errors import ConfigError, EmberfedError, ModelError
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.lora import LoraConfig
from emberfed.models.lora import initial as initial_lora
from emberfed.models.peft_layout import CONFIG_FILE, TENSORS_FILE
from emberfed.models.peft_layout import to_files as peft_files
from emberfed.models.sparse_adapter import SparseAdapterConfig, attached
from emberfed.models.sparse_adapter_files import load_adapter, read_adapter, save_adapter, to_files


def saved(folder: Path, name: str = "llama") -> Path:
    model = model_of(name)
    save_adapter(folder, loud(model), model, "silu", 2)
    return folder


def logits_of(lm: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm(**given).logits
    return found


@pytest.mark.parametrize("name", ["llama", "olmoe", "gpt2", "gpt_neox", "bert", "roberta", "vit", "deit", "clip"])
def test_a_plain_transformers_model_computes_as_ours_and_is_left_as_it_was(name: str, tmp_path: Path) -> None:
    ours, plain = model_of(name), tiny_family_lm(name)
    tensors, given = loud(ours), inputs(ours, "left")
    save_adapter(tmp_path / "adapter", tensors, ours, "silu", 2)
    before, base = all_hooks_of(plain), logits_of(plain, given)
    with torch.no_grad(), attached(ours, tensors, 3, "silu"):
        expected = ours.lm(**given).logits
    adapter = load_adapter(plain, tmp_path / "adapter", top_k=3)
    assert adapter.top_k == 3
    found = logits_of(plain, given)
    real = given["attention_mask"] == 1 if ours.task == "generation" else slice(None)
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, base)
    adapter.remove()
    adapter.remove()
    assert torch.equal(logits_of(plain, given), base)
    assert all_hooks_of(plain) == before


def all_hooks_of(lm: Any) -> list[int]:
    return [len(hooks) for m in lm.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks)]


def test_it_is_a_context_manager_with_the_folders_own_k_on_a_model_of_ours_too(tmp_path: Path) -> None:
    model, given = model_of(), inputs(model_of())
    before = all_hooks(model)
    with emberfed.load_adapter(model, str(saved(tmp_path / "adapter"))) as adapter:
        assert adapter.top_k == 2
        assert adapter.settings.activation == "silu"
        found = logits_of(model.lm, given)
        assert not model.lm(**given).logits.requires_grad, "nothing to train"
    assert all_hooks(model) == before
    with torch.no_grad(), attached(model, loud(model), 2, "silu"):
        assert torch.equal(model.lm(**given).logits, found)


def test_the_same_adapter_gives_the_same_bytes_and_reads_back(tmp_path: Path) -> None:
    model = model_of("vit")
    config = SparseAdapterConfig(num_experts=3, expert_size=5, layers=(1,))
    tensors = loud(model, config)
    files = to_files(tensors, model, "relu", 2)
    assert files == to_files(dict(reversed(tensors.items())), model, "relu", 2)
    save_adapter(tmp_path / "adapter", tensors, model, "relu", 2)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == files
    settings, found = read_adapter(tmp_path / "adapter")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    assert (settings.num_experts, settings.expert_size, settings.layers) == (3, 5, (1,))
    assert (settings.activation, settings.top_k, settings.head, settings.model_type) == ("relu", 2, True, "vit")


def changed(folder: Path, **values: Any) -> Path:
    file = folder / CONFIG_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    return folder


def without(folder: Path, name: str) -> Path:
    (folder / name).unlink()
    return folder


def damaged(folder: Path, name: str) -> Path:
    (folder / name).write_bytes(b"\x93not it")
    return folder


def fewer(folder: Path) -> Path:
    tensors = safetensors.torch.load_file(folder / TENSORS_FILE)
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.0")}
    safetensors.torch.save_file(kept, folder / TENSORS_FILE)
    return folder


def of_peft(folder: Path) -> Path:
    model = model_of()
    lora = initial_lora(model, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    for name, data in peft_files(lora, 4.0, model).items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: folder / "nowhere", "has no .*not the folder of an adapter"),
        (lambda folder: without(folder, TENSORS_FILE), "cannot be read .*copy the whole folder"),
        (lambda folder: damaged(folder, TENSORS_FILE), "cannot be read .*copy the whole folder"),
        (lambda folder: damaged(folder, CONFIG_FILE), "cannot be read .*copy the whole folder"),
        (of_peft, "is an adapter of PEFT.*peft.PeftModel"),
        (lambda folder: changed(folder, format="lora"), "'format' is not 'emberfed-sparse-adapter'"),
        (lambda folder: changed(folder, version=2), "version 2 .*only version 1"),
        (lambda folder: changed(folder, activation="tanh"), "'activation'"),
        (lambda folder: changed(folder, exprt_size=2), "unknown key 'exprt_size'; did you mean 'expert_size'"),
        (lambda folder: changed(folder, expert_size=2), "says expert_size 2, but the tensors say 3"),
        (fewer, r"says layers \(0, 1\), but the tensors say \(0,\)"),
        (lambda folder: changed(folder, model_type="olmo"), "made for model type olmo, but this model's is llama"),
        (lambda folder: changed(folder, hidden_size=64), "made for hidden size 64, but this model's is 32"),
    ],
)
def test_folders_that_do_not_serve_are_refused_in_one_line(change: Any, message: str, tmp_path: Path) -> None:
    model = tiny_family_lm("llama")
    before = all_hooks_of(model)
    with pytest.raises(ModelError, match=message) as caught:
        load_adapter(model, change(saved(tmp_path / "adapter")))
    assert "\n" not in str(caught.value)
    assert all_hooks_of(model) == before


def test_k_above_m_is_refused_when_loading_and_when_saving(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "adapter"), model_of()
    for refused in (
        lambda: load_adapter(model, folder, top_k=5),
        lambda: load_adapter(model, folder, top_k=0),
        lambda: to_files(fresh(model), model, "gelu", 5),
    ):
        with pytest.raises(ConfigError, match="choose 1 to 4"):
            refused()


def test_a_second_adapter_an_unknown_family_and_a_smaller_model_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    model = model_of()
    with load_adapter(model, folder), pytest.raises(ModelError, match="already"):
        load_adapter(model, folder)
    with load_adapter(model, folder):
        pass
    unknown = tiny_family_lm("llama")
    unknown.config.model_type = "lama"
    with pytest.raises(ModelError, match="'lama' has no record"):
        load_adapter(unknown, folder)
    shallow = FoundationModel(tiny_family_lm("llama", num_hidden_layers=1))
    with pytest.raises(ModelError, match=r"layers\.1\..* has no place"):
        load_adapter(shallow, folder)


def test_an_adapter_of_another_model_is_not_saved(tmp_path: Path) -> None:
    tensors = loud(model_of("vit"))
    with pytest.raises(EmberfedError, match=r"head\.bias' has no place"):
        save_adapter(tmp_path / "adapter", tensors, model_of(), "gelu", 2)
    assert not (tmp_path / "adapter").exists()


def test_it_stays_on_a_model_that_nobody_holds_the_handle_of(tmp_path: Path) -> None:
    plain = tiny_family_lm("llama")
    given = inputs(model_of("llama"))
    base, keys = logits_of(plain, given), set(vars(plain))
    load_adapter(plain, saved(tmp_path / "adapter"))
    gc.collect()
    assert not torch.allclose(logits_of(plain, given), base)
    with pytest.raises(ModelError, match="has one already|already"):
        load_adapter(plain, tmp_path / "adapter")
    plain.emberfed_adapter.remove()
    assert torch.equal(logits_of(plain, given), base)
    assert set(vars(plain)) == keys


def test_the_models_config_names_the_adapters_classes_while_it_is_there(tmp_path: Path) -> None:
    plain = tiny_family_lm("vit")
    before = dict(plain.config.id2label)
    folder = saved(tmp_path / "adapter", "vit")
    assert json.loads((folder / CONFIG_FILE).read_text())["classes"] == list(CLASSES)
    with load_adapter(plain, folder):
        assert plain.config.id2label == dict(enumerate(CLASSES))
        assert plain.config.label2id[CLASSES[1]] == 1
    assert plain.config.id2label == before


def test_a_head_for_another_number_of_classes_says_how_to_load_the_model(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter", "vit")
    plain = tiny_family_lm("vit", num_labels=len(CLASSES) + 2)
    with pytest.raises(ModelError, match=rf"head for {len(CLASSES)} classes.*num_labels={len(CLASSES)}") as raised:
        load_adapter(plain, folder)
    assert "\n" not in str(raised.value)
    assert "emberfed_adapter" not in vars(plain)
