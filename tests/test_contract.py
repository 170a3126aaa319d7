"""One suite that every method, engine and family found on disk must pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import FAMILY_VARIANTS, save_tiny_family
from federations import bits, config

import emberfed
from emberfed import assembly
from emberfed.admission import Asked, payload_problem
from emberfed.clients import Budget
from emberfed.config import RunConfig, parse
from emberfed.engine import engine_names
from emberfed.errors import ConfigError
from emberfed.method import Method, method_names
from emberfed.models import lora
from emberfed.models.families import families, load_family
from emberfed.records import ACTIVATION_COUNTS, Bundle, FitResult, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer

TINY: dict[str, Callable[[Path], Path]] = {name: partial(save_tiny_family, name) for name in FAMILY_VARIANTS}
"""A tiny random model of each family, on disk."""

OTHER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "a3smoe": [
        {"frequency": "per_token", "temperature": 0.0},
        {"frequency": "per_activation", "gate": "renormalised"},
    ],
    "flame": [{"rescale": "none"}, {"rescaler_start": "static", "frequency": "per_activation"}],
    "flexlora": [{"active_experts": "budget", "weighting": "activation"}, {"rank": 6}],
    "flora": [{"active_experts": "budget", "weighting": "activation", "temperature": 1.0}],
    "hetlora": [{"weighting": "data", "pruning": 0.5}, {"active_experts": "budget", "weighting": "activation"}],
    "homolora": [{"rank": "adapter"}, {"active_experts": "budget", "weighting": "activation", "gate": "renormalised"}],
}
"""Options under which the contract must hold too, besides the defaults."""

FEW_FAMILIES = ("deepseek_v3", "mixtral", "olmoe")
"""Families on which other options than the defaults are tried: dense first layer, renormalising gate, plain gate."""

NEED_EXPERTS = {"a3smoe", "flame"}
"""Methods that refuse dense models."""

CASES = [
    (family, name, options)
    for family in sorted(TINY)
    for name in method_names()
    if load_family(family).mixture is not None or name not in NEED_EXPERTS
    for options in [{}, *(OTHER_OPTIONS.get(name, []) if family in FEW_FAMILIES else [])]
]


@dataclass(frozen=True)
class Setting:
    """A method on a tiny federation."""

    method: Method
    material: assembly.Material
    state: Bundle
    folder: Path

    def download(self, client: int, round: int = 1) -> Payload:
        return self.method.dispatch(self.state, self.material.clients[client], round)

    def fit(self, client: int, download: Payload | None = None) -> FitResult:
        who = self.material.clients[client]
        seeds = Seeds(0).at(round=1, client=who.id)
        shard = self.material.shards[who.id]
        return self.method.fit(self.material.model, download or self.download(client), who, shard, Bundle(), seeds)

    def uploads(self, *clients: int) -> list[Payload]:
        return [Payload(1, self.material.clients[client].id, self.fit(client).upload) for client in clients]


def test_every_family_has_a_tiny_model_here() -> None:
    assert set(families()) == set(TINY)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each family, made when it is first asked for."""
    return cache(lambda family: TINY[family](tmp_path_factory.mktemp(family)))


@pytest.fixture(
    scope="module", params=CASES, ids=lambda case: "-".join([case[0], case[1], *map(str, case[2].values())])
)
def setting(request: pytest.FixtureRequest, folders: Callable[[str], Path], tiny_data: Path) -> Setting:
    family, name, options = request.param
    checked = checked_config(family, folders, tiny_data, {"name": name, **options})
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    state = method.init(material.model, material.budgets, Seeds(0).at(purpose="init"))
    return Setting(method, material, state, folders(family))


def checked_config(family: str, folders: Callable[[str], Path], data: Path, method: dict[str, Any]) -> RunConfig:
    values = config(folders(family), data, method=method)
    if family == "qwen2":  # transformers takes any tokenizer beside a Qwen2 model for Qwen2's own kind
        values["model"]["tokenizer"] = str(folders("olmoe"))
    if load_family(family).mixture is None:  # a dense model has one expert
        values["clients"]["tiers"] = [{**tier, "top_k": 1} for tier in values["clients"]["tiers"]]
    return parse(values)


@pytest.mark.parametrize("name", sorted(NEED_EXPERTS))
def test_methods_that_need_experts_refuse_dense_models(
    name: str, folders: Callable[[str], Path], tiny_data: Path
) -> None:
    checked = checked_config("llama", folders, tiny_data, {"name": name})
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    with pytest.raises(ConfigError, match=r"needs a model with experts, but llama models are dense"):
        method.init(material.model, material.budgets, Seeds(0))


def digest(bundle: Bundle) -> str:
    return hashlib.sha256(bundle.to_bytes()).hexdigest()


def model_digest(setting: Setting) -> str:
    """Everything about the base model that a hop could change: names, types, values, flags, K, hooks."""
    model = setting.material.model
    told = hashlib.sha256()
    for name, module in model.lm.named_modules():
        told.update(f"{name} {type(module)} {module.training} {len(module._forward_hooks)}".encode())
        told.update(str(len(module._forward_pre_hooks)).encode())
    for name, tensor in [*model.lm.named_parameters(), *model.lm.named_buffers()]:
        told.update(f"{name} {tensor.dtype} {tensor.requires_grad} {tensor.grad is None}".encode())
        told.update(tensor.detach().float().numpy().tobytes())
    told.update(str((model.top_k, model.lm.config.to_dict())).encode())
    return told.hexdigest()


def logits(setting: Setting) -> torch.Tensor:
    model = setting.material.model
    ids = torch.arange(12).view(2, 6) + 3
    with torch.inference_mode():
        answer: torch.Tensor = model.lm(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.clone()
    return answer


def test_it_says_what_it_is(setting: Setting) -> None:
    assert setting.method.title
    assert setting.method.paper
    assert setting.method.Config.__doc__


def test_the_state_and_payloads_survive_the_wire(setting: Setting) -> None:
    assert digest(Bundle.from_bytes(setting.state.to_bytes())) == digest(setting.state)
    download = setting.download(0)
    assert (download.round, download.client) == (1, setting.material.clients[0].id)
    received = Payload.from_bytes(download.to_bytes())
    one, other = setting.fit(0, download).upload, setting.fit(0, received).upload
    assert digest(one) == digest(other)


def test_the_initial_state_changes_nothing_at_the_native_k(setting: Setting) -> None:
    native = next(budget for budget in setting.material.budgets if budget.top_k == setting.material.model.native_top_k)
    before = logits(setting)
    with setting.method.deploy(setting.state, setting.material.model, native):
        deployed = logits(setting)
    if getattr(setting.method.config, "gate", "native") in (
        "native",
        *{block.native_gate for block in setting.material.model.blocks},
    ):
        assert torch.equal(before, deployed)
    else:
        assert not torch.equal(before, deployed), "renormalising changes a model that does not renormalise"


def test_fit_and_deploy_leave_model_inputs_and_global_randomness_as_found(setting: Setting) -> None:
    model, state, download = model_digest(setting), digest(setting.state), setting.download(0)
    content, stream = digest(download.content), torch.get_rng_state()
    setting.fit(0, download)
    for budget in setting.material.budgets:
        with setting.method.deploy(setting.state, setting.material.model, budget) as deployed:
            assert deployed.top_k == budget.top_k
            logits(setting)
    assert model_digest(setting) == model
    assert digest(setting.state) == state
    assert digest(download.content) == content
    assert torch.equal(torch.get_rng_state(), stream)


def test_the_model_is_as_found_after_a_failure_inside(setting: Setting) -> None:
    model = model_digest(setting)
    budget = setting.material.budgets[0]
    with (
        pytest.raises(RuntimeError, match="trouble"),
        setting.method.deploy(setting.state, setting.material.model, budget),
    ):
        raise RuntimeError("trouble")
    assert model_digest(setting) == model


def test_fit_is_the_same_whatever_the_global_stream_holds(setting: Setting) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        one = digest(setting.fit(1).upload)
        torch.manual_seed(2)
        other = digest(setting.fit(1).upload)
    assert one == other


def test_an_honest_upload_is_admitted_and_moves_something(setting: Setting) -> None:
    for number, client in enumerate(setting.material.clients):
        download = setting.download(number)
        upload = setting.fit(number, download).upload
        asked = Asked(1, client.id, setting.method.expects(setting.state, download), download.content.meta["top_k"])
        assert payload_problem(Payload(1, client.id, upload), asked) is None
        assert any(bool(tensor.any()) for name, tensor in upload.tensors.items() if name.endswith(".lora_B"))
        assert upload.meta["examples"] == len(setting.material.shards[client.id].examples)


def as_trained(setting: Setting, upload: Bundle, budget: Budget) -> torch.Tensor:
    """Logits of the adapter a client sent, at a budget, without going through the method."""
    model, gate = setting.material.model, setting.method.config.gate
    tensors = {name: tensor for name, tensor in upload.tensors.items() if name.startswith("layers.")}
    if "rescaler" in upload.tensors:
        numbers = upload.tensors["rescaler"][:, None].unbind()
        layers = [block.layer for block in model.blocks]
        tensors |= {f"layers.{layer}.router.rescaler": s for layer, s in zip(layers, numbers, strict=True)}
    with model.active_experts(budget.top_k, gate), lora.attached(model, tensors, setting.method.adapter.alpha):
        return logits(setting)


def as_deployed(setting: Setting, state: Bundle, budget: Budget) -> torch.Tensor:
    with setting.method.deploy(state, setting.material.model, budget):
        return logits(setting)


def test_aggregation_is_pure_and_one_client_gets_its_update_back(setting: Setting) -> None:
    state, uploads = digest(setting.state), setting.uploads(0)
    content, budget = digest(uploads[0].content), setting.material.clients[0].budget
    after = setting.method.aggregate(setting.state, uploads)
    assert digest(setting.state) == state
    assert digest(uploads[0].content) == content
    assert digest(setting.method.aggregate(setting.state, uploads)) == digest(after)
    trained = as_trained(setting, uploads[0].content, budget)
    torch.testing.assert_close(as_deployed(setting, after, budget), trained, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(as_deployed(setting, setting.state, budget), trained, rtol=1e-4, atol=2e-5)


def test_clients_that_agree_are_not_changed_by_averaging(setting: Setting) -> None:
    [upload] = setting.uploads(0)
    budget = setting.material.clients[0].budget
    twins = [upload, Payload(1, "twin", upload.content)]
    after = setting.method.aggregate(setting.state, twins)
    trained = as_trained(setting, upload.content, budget)
    torch.testing.assert_close(as_deployed(setting, after, budget), trained, rtol=1e-4, atol=2e-5)


def product(tensors: Mapping[str, torch.Tensor], name: str, expert: int) -> torch.Tensor:
    """B A of one expert, given the name of either factor."""
    path = name.rpartition(".")[0]
    return tensors[f"{path}.lora_B"][expert] @ tensors[f"{path}.lora_A"][expert]


def test_experts_nobody_used_keep_what_they_were(setting: Setting) -> None:
    uploads = setting.uploads(0, 1)
    if ACTIVATION_COUNTS not in uploads[0].content.tensors:
        assert not setting.material.model.blocks
        pytest.skip("a dense model has no experts")
    silenced = []
    for upload in uploads:
        counts = upload.content.tensors[ACTIVATION_COUNTS].clone()
        counts[0, 3] = 0
        silenced.append(
            Payload(
                1, upload.client, Bundle({**upload.content.tensors, ACTIVATION_COUNTS: counts}, upload.content.meta)
            )
        )
    after = setting.method.aggregate(setting.state, silenced)
    first = setting.material.model.blocks[0].layer
    names = [name for name in after.tensors if name.startswith(f"layers.{first}.experts.")]
    assert names
    for name in names:
        before, now = setting.state.tensors[name][3], after.tensors[name][3]
        if before.shape == now.shape:
            assert torch.equal(now, before), name
        else:
            assert torch.equal(product(after.tensors, name, 3), product(setting.state.tensors, name, 3)), name


def test_experts_without_tokens_keep_their_bits_in_training(setting: Setting) -> None:
    if not setting.material.model.blocks:
        pytest.skip("a dense model has no experts")
    upload = setting.fit(0).upload
    untouched = (upload.tensors[ACTIVATION_COUNTS] == 0).nonzero().tolist()
    touched = (upload.tensors[ACTIVATION_COUNTS] > 0).nonzero().tolist()
    names = [name for name in setting.state.tensors if ".experts." in name and name.endswith("lora_B")]
    layers = [block.layer for block in setting.material.model.blocks]
    for name in names:
        layer = int(name.split(".")[1])
        for row, expert in untouched:
            if layers[row] == layer:
                assert not upload.tensors[name][expert].any(), "B is zero at first"
    moved = [
        bool(upload.tensors[f"layers.{layers[row]}.experts.down_proj.lora_B"][expert].any()) for row, expert in touched
    ]
    assert names
    assert any(moved)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_the_exported_adapter_gives_the_deployed_logits_in_peft(setting: Setting, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    after = setting.method.aggregate(setting.state, setting.uploads(0, 1, 2, 3))
    for name, data in setting.method.export(after, setting.material.model).items():
        (tmp_path / name).write_bytes(data)
    if getattr(setting.method.config, "gate", "native") != "native":
        pytest.skip("PEFT runs the checkpoint's own gate")
    if setting.state.meta.get("rescale") == "learnable":
        pytest.skip("PEFT has no place for a rescaler")
    native = next(budget for budget in setting.material.budgets if budget.top_k == setting.material.model.native_top_k)
    with setting.method.deploy(after, setting.material.model, native):
        ours = logits(setting)
    theirs_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(setting.folder), tmp_path)
    ids = torch.arange(12).view(2, 6) + 3
    with torch.inference_mode():
        theirs = theirs_model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", method_names())
def test_every_engine_gives_the_same_bits(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    digests = {}
    for engine in engine_names():
        values = config(
            tiny_model_folder,
            tiny_data,
            method={"name": method},
            training={"rounds": 2},
            evaluation={"every": 0},
            engine={"name": engine},
        )
        digests[engine] = bits(emberfed.run(values, output=tmp_path / engine).path)
    assert all(found == digests["local"] for found in digests.values())
    assert len(digests) == len(engine_names()) >= 2
