"""Families that tell classes apart: loading, heads, hosts, LoRA, PEFT, merging, footprint."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from builders import CLASSES, CLASSIFIER_VARIANTS, FAMILY_VARIANTS, tiny_family_lm, tiny_tokenizer, token_ids
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    CLIPConfig,
    CLIPModel,
    DeiTForImageClassificationWithTeacher,
    RobertaForMaskedLM,
    ViTModel,
)

from emberfed.errors import ConfigError, ModelError
from emberfed.models import lora, lora_layout, merging, peft_layout
from emberfed.models.config import ModelConfig
from emberfed.models.families import load_family
from emberfed.models.fingerprint import fingerprint
from emberfed.models.footprint import memory_by_module, parameter_count, total
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.head import attached_head, initial_head, is_head
from emberfed.models.hosts import hosts_of
from emberfed.models.loading import load, load_model, model_path
from emberfed.models.lora import LoraConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

VARIANTS = [name for names in CLASSIFIER_VARIANTS.values() for name in names]
FAMILIES = [name for names in FAMILY_VARIANTS.values() for name in names]
ALPHA = 16.0
OTHERS = ("x", "y", "z")
Tensors = dict[str, torch.Tensor]


def example_inputs(name: str, examples: int = 3) -> dict[str, torch.Tensor]:
    """What a model of the family is called with; of texts the last one is padded."""
    generator = torch.Generator().manual_seed(7)
    if name in CLASSIFIER_VARIANTS["bert"] + CLASSIFIER_VARIANTS["roberta"] + tuple(FAMILIES):
        mask = torch.ones(examples, 9, dtype=torch.int64)
        mask[-1, 6:] = 0
        return {"input_ids": token_ids(examples, 9), "attention_mask": mask}
    return {"pixel_values": torch.randn(examples, 3, 8, 8, generator=generator)}


def logits(lm: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = lm(**example_inputs(name)).logits
    return answer


def loss_of(lm: Any, name: str) -> torch.Tensor:
    found: torch.Tensor = nn.functional.cross_entropy(lm(**example_inputs(name)).logits, torch.tensor([0, 3, 4]))
    return found


def saved(lm: Any, folder: Path) -> str:
    lm.save_pretrained(folder)
    return str(folder)


def loaded(path: str, classes: Sequence[str] | None = CLASSES, **options: Any) -> FoundationModel:
    return load_model(ModelConfig.model_validate({"path": path, "device": "cpu"} | options), classes)


def plain(name: str, folder: str, **options: Any) -> Any:
    of_text = load_family(name.partition("-")[0]).task == "text_classification"
    auto: Any = AutoModelForSequenceClassification if of_text else AutoModelForImageClassification
    return auto.from_pretrained(folder, **options).eval()


def tiny(name: str) -> FoundationModel:
    return FoundationModel(tiny_family_lm(name))


def adapter(model: FoundationModel, seed: int = 0, **options: Any) -> Tensors:
    """A whole adapter with every value moved, so that none is as in the base."""
    generator = torch.Generator().manual_seed(seed)
    fresh = lora.initial(model, LoraConfig(rank=3, alpha=ALPHA, **options), generator)
    return {name: value + 0.1 * torch.randn(value.shape, generator=generator) for name, value in fresh.items()}


def traces(model: FoundationModel) -> tuple[Any, ...]:
    """Everything of the base: numbers, which objects, gradients, modules and hooks."""
    return (
        fingerprint(model.lm),
        [(name, id(value), value.requires_grad, value.grad is None) for name, value in model.lm.named_parameters()],
        [(name, id(module), len(module._forward_hooks), len(module._forward_pre_hooks)) for name, module in
         model.lm.named_modules()],
    )  # fmt: skip


# Loading.


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_are_transformers_own_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = saved(tiny_family_lm(name), tmp_path)
    model = loaded(folder)
    assert torch.equal(logits(model.lm, name), logits(plain(name, folder), name))
    assert (model.num_classes, model.shape.vocabulary, model.is_dense) == (5, 5, True)
    assert model.lm.config.id2label == dict(enumerate(CLASSES))
    assert model.task == load_family(name.partition("-")[0]).task
    assert not any(parameter.requires_grad for parameter in model.lm.parameters())
    assert not model.lm.training


@pytest.mark.parametrize("name", VARIANTS)
def test_a_head_of_the_same_classes_is_kept_and_another_drawn_always_alike(name: str, tmp_path: Path) -> None:
    """Also with as many classes of other names, or in another order: those rows mean other things."""
    folder = saved(tiny_family_lm(name), tmp_path)
    state = torch.random.get_rng_state()
    base = loaded(folder)
    own = initial_head(base)
    for classes in (OTHERS, CLASSES[::-1], ("a", "b", "c", "d", "e")):
        torch.manual_seed(len(classes[0]))
        first, second = loaded(folder, classes), loaded(folder, classes)
        assert fingerprint(first.lm) == fingerprint(second.lm)
        head = initial_head(first)
        assert all(not torch.equal(head[key], own[key]) for key in own)
        assert all(bool(value.any()) for key, value in head.items() if key.endswith("weight"))
        assert (first.num_classes, len(logits(first.lm, name)[0])) == (len(classes), len(classes))
        rest, other = base.lm.state_dict(), first.lm.state_dict()
        assert all(torch.equal(rest[key], other[key]) for key in rest if not key.startswith("classifier"))
    torch.random.set_rng_state(state)


def pretrained(kind: str) -> Any:
    """Checkpoints as they are published: without the head, with others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if kind == "vit":
            return ViTModel(tiny_family_lm("vit").config)
        if kind == "deit":
            return DeiTForImageClassificationWithTeacher(tiny_family_lm("deit").config)
        if kind == "bert":
            return BertForMaskedLM(tiny_family_lm("bert").config)
        if kind == "roberta":
            return RobertaForMaskedLM(tiny_family_lm("roberta").config)
        text = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2}
        vision = tiny_family_lm("clip").config.vision_config.to_dict()
        return CLIPModel(CLIPConfig(text_config=text | {"vocab_size": 8}, vision_config=vision))


@pytest.mark.parametrize("kind", CLASSIFIER_VARIANTS)
def test_what_pretraining_leaves_out_is_drawn_and_its_own_heads_are_left(kind: str, tmp_path: Path) -> None:
    theirs = pretrained(kind)
    folder = saved(theirs, tmp_path)
    state = torch.random.get_rng_state()
    model, again = loaded(folder), loaded(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fingerprint(model.lm) == fingerprint(again.lm)
    given = theirs.state_dict()
    kept = {key.removeprefix(f"{kind}.") for key in given}
    fresh = [key for key in model.lm.state_dict() if key not in given and key.removeprefix(f"{kind}.") not in kept]
    assert {key.partition(".")[0] if key.startswith("c") else key for key in fresh} == (
        {"classifier", "bert.pooler.dense.weight", "bert.pooler.dense.bias"} if kind == "bert" else {"classifier"}
    )
    if kind == "bert":
        assert bool(model.lm.get_parameter("bert.pooler.dense.weight").any())
    assert bool(torch.isfinite(logits(model.lm, kind)).all())


@pytest.mark.parametrize("name", ["vit", "roberta", "gpt2", "olmoe"])
def test_random_weights_need_only_a_config(name: str, tmp_path: Path) -> None:
    tiny_family_lm(name).config.save_pretrained(tmp_path)
    state = torch.random.get_rng_state()
    classes = CLASSES if name in CLASSIFIER_VARIANTS else None
    first, second = (loaded(str(tmp_path), classes, weights="random") for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert fingerprint(first.lm) == fingerprint(second.lm)
    assert len(logits(first.lm, name)[0]) == (5 if classes else 9)
    assert first.lm.dtype == torch.float32
    assert loaded(str(tmp_path), classes, weights="random", dtype="bfloat16").lm.dtype == torch.bfloat16
    impossible = (
        "only a checkpoint's weights can be kept so" if name == "olmoe" else "models are dense and have no experts"
    )
    with pytest.raises(ModelError, match=f"expert_bits is 8, but .*{impossible}"):
        loaded(str(tmp_path), classes, weights="random", expert_bits=8)


def without(folder: Path, *parts: str) -> None:
    """Take tensors out of a checkpoint; their names there are older than those in the model."""
    file = folder / "model.safetensors"
    tensors = {key: value for key, value in safetensors.torch.load_file(file).items() if not re.search("|".join(parts), key)}  # fmt: skip  # noqa: E501
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            r"layer\.1\.intermediate\.dense\.weight",
            r"1 weights are not in the checkpoint, the first is 'vit\.layers\.1\.mlp\.fc1",
        ),
        (r"embeddings\.cls_token", r"1 weights are not in the checkpoint, the first is 'vit\.embeddings\.cls_token'"),
    ],
)
def test_other_missing_weights_stay_errors(part: str, message: str, tmp_path: Path) -> None:
    folder = saved(tiny_family_lm("vit"), tmp_path)
    without(tmp_path, part, "classifier")
    with pytest.raises(ModelError, match=message):
        loaded(folder)


@pytest.mark.parametrize("name", ["bert", "vit", "clip"])
def test_layers_the_config_does_not_tell_of_are_refused(name: str, tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"num_hidden_layers": 3}
    if name == "clip":
        overrides = {"vision_config": tiny_family_lm("clip").config.vision_config.to_dict() | overrides}
    folder = saved(tiny_family_lm(name, **overrides), tmp_path)
    tiny_family_lm(name).config.save_pretrained(folder)
    with pytest.raises(ModelError, match=r"16 tensors .* have no place .*, the first is '[a-z_.]+\.2\."):
        loaded(folder)


def test_tasks_and_classes_that_do_not_go_with_a_family(tmp_path: Path) -> None:
    vit, llama = saved(tiny_family_lm("vit"), tmp_path / "vit"), saved(tiny_family_lm("llama"), tmp_path / "llama")
    with pytest.raises(ModelError, match="vit models are for image classification and need the names of classes"):
        load(ModelConfig(path=vit))
    with pytest.raises(ModelError, match=r"llama models are for generation, but classes .* \(cat, dog, emu, \.\.\.\)"):
        loaded(llama)
    with pytest.raises(ModelError, match=r"vit models .*, but data\.task is 'text_classification'.*: bert, roberta\)"):
        load_model(ModelConfig(path=vit), CLASSES, "text_classification")
    for classes in ((), ("one",), ("two", "two")):
        with pytest.raises(ModelError, match="two or more classes of different names"):
            loaded(vit, classes)
    assert load_model(ModelConfig(path=vit), CLASSES, "image_classification").num_classes == 5


def test_builtin_models_are_of_a_task() -> None:
    built_in = ModelConfig()
    assert model_path(built_in) == model_path(built_in, "generation") != model_path(built_in, "image_classification")
    with pytest.raises(ModelError, match="no model for text classification comes with the package"):
        model_path(built_in, "text_classification")
    with pytest.raises(ModelError, match="no model for text classification comes with the package"):
        load_model(built_in, CLASSES, "text_classification")


def test_the_built_in_vision_model_takes_other_classes() -> None:
    model = load_model(ModelConfig(device="cpu"), OTHERS)
    assert (model.task, model.num_classes) == ("image_classification", 3)
    assert model.shape.image is not None


# Where parts are.


@pytest.mark.parametrize("name", VARIANTS + FAMILIES)
def test_hosts_are_where_the_ffn_is_in_every_layer(name: str) -> None:
    model = tiny(name)
    hosts = model.hosts()
    assert list(hosts) == list(range(model.shape.num_layers)) == list(hosts_of(model.lm, model.family))
    seen: list[tuple[int, int]] = []
    expected = logits(model.lm, name)
    hooks = []
    for layer, host in hosts.items():
        assert host.layer == layer

        def read(_: nn.Module, args: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            seen.append((layer, args[0].shape[-1]))

        def add(_: nn.Module, __: Any, output: Any) -> Any:
            more = torch.linspace(0, 1, 32)
            return (output[0] + more, *output[1:]) if isinstance(output, tuple) else output + more

        hooks += [host.source.register_forward_pre_hook(read), host.target.register_forward_hook(add)]
    changed = logits(model.lm, name)
    for hook in hooks:
        hook.remove()
    assert seen == [(layer, 32) for layer in hosts]
    assert (changed - expected).abs().max() > 1e-3
    assert torch.equal(logits(model.lm, name), expected)


def test_a_host_that_is_not_there_is_named() -> None:
    lm: Any = tiny_family_lm("bert")
    del lm.bert.encoder.layer[1].output.dense
    with pytest.raises(ModelError, match=r"no bert\.encoder\.layer\.1\.output\.dense: not a bert model as .*bert\.py"):
        FoundationModel(lm)
    lm = tiny_family_lm("vit")
    del lm.classifier
    with pytest.raises(ModelError, match=r"the model has no classifier: not a vit model"):
        FoundationModel(lm)
    lm = tiny_family_lm("vit")
    del lm.vit.layers
    with pytest.raises(ModelError, match=r"the model has no vit\.layers: not a vit model"):
        hosts_of(lm, load_family("vit"))


@pytest.mark.parametrize("name", VARIANTS)
def test_sizes(name: str) -> None:
    model = tiny(name)
    shape = model.shape
    assert (shape.hidden, shape.dense_intermediate, shape.heads, shape.num_layers) == (32, 48, 4, 2)
    assert (shape.qk_head_dim, shape.v_head_dim, shape.parallel_residual) == (8, 8, False)
    assert set(shape.attention.values()) == {(32, 32)}
    assert lora_layout.linear_sizes(lora_layout.mlp_linears(model)) == {
        f"layers.{layer}.mlp.{linear}": size
        for layer in (0, 1)
        for linear, size in zip(shape.mlp, ((48, 32), (32, 48)), strict=True)
    }
    assert list(shape.head.values())[-1] == (5, 32)
    if model.task == "image_classification":
        assert shape.image is not None
        image = shape.image
        assert (image.channels, image.height, image.width, image.patches, image.patch_values) == (3, 8, 8, 4, 48)
        seen = []
        with model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1])):
            logits(model.lm, name)
        assert seen == [image.positions]


@pytest.mark.parametrize("name", VARIANTS)
def test_memory_by_module_is_all_of_it(name: str) -> None:
    model = tiny(name)
    rows = {row.module: row for row in memory_by_module(model.lm)}
    assert rows["head"].weights == sum(value.numel() for value in initial_head(model).values())
    linears = {path: getattr(*slot) for path, slot in lora_layout.linears(model).items()}
    for kind, part in (("attention", ".self_attn."), ("dense MLPs", ".mlp.")):
        found = [linear for path, linear in linears.items() if part in path]
        assert rows[kind].weights == sum(value.numel() for linear in found for value in linear.parameters())
    assert set(rows) == {"embedding", "attention", "dense MLPs", "norms", "head"} | (
        {"other"} if name == "bert" else set()  # its pooler
    )
    buffers = sum(buffer.numel() for buffer in model.lm.buffers())
    assert total(rows.values()).weights == parameter_count(model.lm) + buffers == model.shape.parameters + buffers


# Heads.


@pytest.mark.parametrize("name", VARIANTS)
def test_an_attached_head_takes_the_gradients_and_leaves_no_trace(name: str) -> None:
    model = tiny(name)
    before, expected = traces(model), logits(model.lm, name)
    head = initial_head(model)
    assert all(is_head(key) for key in head)
    parameters = {key: nn.Parameter(value) for key, value in head.items()}
    with attached_head(model, {**parameters, "layers.0.adapter.router.weight": nn.Parameter(torch.zeros(1))}):
        assert torch.equal(logits(model.lm, name), expected)
        loss_of(model.lm, name).backward()  # type: ignore[no-untyped-call]
    assert traces(model) == before
    twin: Any = tiny_family_lm(name)
    loss_of(twin, name).backward()  # type: ignore[no-untyped-call]
    own = dict(twin.classifier.named_parameters())
    assert sorted(parameters) == sorted(f"head.{key}" for key in own)
    for key, parameter in parameters.items():
        torch.testing.assert_close(parameter.grad, own[key.removeprefix("head.")].grad)
    with pytest.raises(RuntimeError, match="stop"), attached_head(model, parameters):
        raise RuntimeError("stop")
    assert traces(model) == before


def test_a_generating_model_has_no_head() -> None:
    model = tiny("llama")
    assert initial_head(model) == {}
    with attached_head(model, {}):
        logits(model.lm, "llama")
    with pytest.raises(ConfigError, match=r"adapter\.head is true, but this llama model has no head for classes"):
        lora.initial(model, LoraConfig(head=True), torch.Generator())


def test_a_head_in_half_precision_is_trained_in_float32() -> None:
    model = FoundationModel(tiny_family_lm("vit").to(torch.bfloat16))
    head = {key: nn.Parameter(value) for key, value in initial_head(model).items()}
    assert {value.dtype for value in head.values()} == {torch.float32}
    expected = logits(model.lm, "vit")
    with attached_head(model, head):
        assert torch.equal(logits(model.lm, "vit"), expected)
        loss_of(model.lm, "vit").backward()  # type: ignore[no-untyped-call]
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in head.values())


# LoRA.


@pytest.mark.parametrize("name", [*VARIANTS, "gpt2", "gpt_neox"])
def test_a_fresh_adapter_changes_no_bit(name: str) -> None:
    model = tiny(name)
    before, expected = traces(model), logits(model.lm, name)
    tensors = lora.initial(model, LoraConfig(rank=3), torch.Generator().manual_seed(0))
    assert list(tensors) == sorted(tensors)
    assert any(map(is_head, tensors)) == (name in VARIANTS)
    with lora.attached(model, tensors, ALPHA) as attached:
        assert torch.equal(logits(model.lm, name), expected)
        assert all(torch.equal(value, tensors[key]) for key, value in attached.tensors().items())
    assert traces(model) == before


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_dense_adapted_weights(name: str) -> None:
    """With W' = W + s B A, the loss's gradient G at W' gives s B'G for A, and s G A' for B; the head's is G itself."""
    model = tiny(name)
    tensors = adapter(model)
    twin: Any = tiny_family_lm(name).requires_grad_(False)
    scale, names = ALPHA / 3, {module: path for path, module in model.lm.named_modules()}
    weights = {}
    for path, (module, attribute) in lora_layout.linears(model).items():
        weight = twin.get_parameter(f"{names[module]}.{attribute}.weight")
        weight.add_(scale * tensors[f"{path}.lora_B"] @ tensors[f"{path}.lora_A"])
        weights[path] = weight.requires_grad_()
    for key, parameter in twin.classifier.named_parameters():
        parameter.copy_(tensors[f"head.{key}"])
        parameter.requires_grad_()
    expected = loss_of(twin, name)
    expected.backward()  # type: ignore[no-untyped-call]
    with lora.attached(model, tensors, ALPHA) as attached:
        found = loss_of(model.lm, name)
        found.backward()  # type: ignore[no-untyped-call]
        assert set(attached.trainable_groups().dense) == set(tensors)
    torch.testing.assert_close(found, expected)
    assert len(weights) == 2 * 6
    for path, weight in weights.items():
        a, b = (attached.parameters[f"{path}.lora_{factor}"] for factor in "AB")
        torch.testing.assert_close(a.grad, scale * b.detach().T @ weight.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b.grad, scale * weight.grad @ a.detach().T, rtol=1e-4, atol=1e-5)
    for key, parameter in twin.classifier.named_parameters():
        torch.testing.assert_close(attached.parameters[f"head.{key}"].grad, parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model = tiny(name)
    tensors = adapter(model)

    def gradients() -> Tensors:
        with lora.attached(model, tensors, ALPHA) as attached:
            loss_of(model.lm, name).backward()  # type: ignore[no-untyped-call]
        return {key: value.grad for key, value in attached.parameters.items() if value.grad is not None}

    expected = gradients()
    with model.gradient_checkpointing():
        found = gradients()
    assert expected.keys() == found.keys() == tensors.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_head_can_be_left_alone() -> None:
    model = tiny("roberta")
    fresh = lora.initial(model, LoraConfig(head=False), torch.Generator())
    assert not any(map(is_head, fresh))
    whole = lora.initial(model, LoraConfig(), torch.Generator())
    assert {key for key in whole if is_head(key)} == {
        f"head.{part}.{kind}" for part in ("dense", "out_proj") for kind in ("weight", "bias")
    }


def test_a_head_belongs_together_and_has_the_model_s_shape() -> None:
    model = tiny("vit")
    tensors = adapter(model)
    with pytest.raises(ModelError, match=r"has 'head\.weight' but lacks 'head\.bias'; the parameters of a head belong"):
        lora.check(model, {key: value for key, value in tensors.items() if key != "head.bias"})
    with pytest.raises(ModelError, match=r"'head\.weight' has shape \(4, 32\); expected \(5, 32\)"):
        lora.check(model, tensors | {"head.weight": torch.zeros(4, 32)})
    with pytest.raises(ModelError, match=r"'head\.wait' has no place in this model.*head\.weight"):
        lora.check(model, tensors | {"head.wait": torch.zeros(1)})
    with pytest.raises(ModelError, match=r"'head\.weight' has no place"):
        lora.check(tiny("llama"), {"head.weight": torch.zeros(5, 32)})


# PEFT and merging.


def written(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


PARTS: dict[str, dict[str, bool]] = {
    "all": {},
    "no head": {"head": False},
    "MLPs": {"attention": False},
    "attention": {"dense_mlp": False},
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("name", VARIANTS)
def test_plain_peft_computes_the_same_and_what_it_saves_reads_back(
    name: str, part: dict[str, bool], tmp_path: Path
) -> None:
    base = saved(tiny_family_lm(name), tmp_path / "base")
    model = loaded(base)
    tensors = adapter(model, **part)
    folder = written(peft_layout.to_files(tensors, ALPHA, model), tmp_path / "adapter")
    theirs = PeftModel.from_pretrained(plain(name, base), folder)
    with lora.attached(model, tensors, ALPHA):
        expected = logits(model.lm, name)
    torch.testing.assert_close(logits(theirs, name), expected, rtol=1e-5, atol=1e-5)
    assert (expected - logits(model.lm, name)).abs().max() > 0.01
    for place in (folder, tmp_path / "again"):
        found, alpha = peft_layout.from_peft(place, model)
        assert (alpha, list(found)) == (ALPHA, list(tensors))
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
        theirs.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("name", VARIANTS)
def test_one_layer_and_ranks_that_differ_mean_the_same_to_peft(name: str, tmp_path: Path) -> None:
    """BERT's MLP ends in `output.dense`, as its attention's `attention.output.dense` does."""
    base = saved(tiny_family_lm(name), tmp_path / "base")
    model = loaded(base)
    last = model.shape.mlp[-1]
    small = lora.initial(model, LoraConfig(rank=2, attention=False), torch.Generator().manual_seed(1))
    for case, tensors in enumerate(
        (
            {key: value for key, value in adapter(model).items() if f"mlp.{last}." in key},
            {key: value for key, value in adapter(model).items() if f"layers.1.mlp.{last}." in key},
            adapter(model) | {key: value + 0.1 for key, value in small.items() if f"mlp.{last}." in key},
        )
    ):
        folder = written(peft_layout.to_files(tensors, ALPHA, model), tmp_path / str(case))
        with lora.attached(model, tensors, ALPHA):
            expected = logits(model.lm, name)
        found = logits(PeftModel.from_pretrained(plain(name, base), folder), name)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert peft_layout.from_peft(folder, model)[0].keys() == tensors.keys()


@pytest.mark.parametrize("name", ["vit", "roberta"])
def test_an_adapter_of_peft_s_own_making(name: str, tmp_path: Path) -> None:
    base = saved(tiny_family_lm(name), tmp_path / "base")
    generator = torch.Generator().manual_seed(0)
    config = PeftLoraConfig(r=3, lora_alpha=5, target_modules=["query", "q_proj"], modules_to_save=["classifier"])
    with torch.random.fork_rng(devices=[]):
        theirs = get_peft_model(plain(name, base), config)
    with torch.no_grad():
        for key, parameter in sorted(theirs.named_parameters()):
            if "lora_" in key or "modules_to_save" in key:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    model = loaded(base)
    tensors, alpha = peft_layout.from_peft(tmp_path / "adapter", model)
    with lora.attached(model, tensors, alpha):
        torch.testing.assert_close(logits(model.lm, name), logits(theirs.eval(), name), rtol=1e-5, atol=1e-5)
    started = lora.initial(
        model,
        LoraConfig(rank=3, alpha=5, dense_mlp=False, start_from=str(tmp_path / "adapter")),
        torch.Generator(),
    )
    assert all(torch.equal(started[key], tensors[key]) for key in tensors)
    with pytest.raises(ConfigError, match=r"adapts the head, but adapter\.head is false; set adapter\.head=true"):
        lora.initial(
            model,
            LoraConfig(rank=3, alpha=5, dense_mlp=False, head=False, start_from=str(tmp_path / "adapter")),
            torch.Generator(),
        )


@pytest.mark.parametrize("name", [*VARIANTS, "gpt2", "gpt_neox"])
def test_merging_computes_the_same_and_is_undone(name: str, tmp_path: Path) -> None:
    model = tiny(name)
    tensors, before = adapter(model), traces(model)
    with lora.attached(model, tensors, ALPHA):
        expected = logits(model.lm, name)
    with merging.merged(model, tensors, ALPHA):
        torch.testing.assert_close(logits(model.lm, name), expected, rtol=1e-4, atol=1e-4)
    assert traces(model) == before
    merging.merge_into(model, tensors, ALPHA)
    merging.write_checkpoint(model, tiny_tokenizer() if model.shape.image is None else None, tmp_path)
    again = loaded(str(tmp_path), CLASSES if name in VARIANTS else None)
    torch.testing.assert_close(logits(again.lm, name), expected, rtol=1e-4, atol=1e-4)
