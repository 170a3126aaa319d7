"""One suite that every method, engine and family found on disk must pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import FAMILY_VARIANTS, save_tiny_family
from federations import bits, config

import emberfed
from emberfed import assembly
from emberfed.admission import Asked, payload_problem
from emberfed.config import parse
from emberfed.engine import engine_names
from emberfed.method import Method, method_names
from emberfed.models.families import families
from emberfed.records import ACTIVATION_COUNTS, Bundle, FitResult, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer

TINY: dict[str, Callable[[Path], Path]] = {name: partial(save_tiny_family, name) for name in FAMILY_VARIANTS}
"""A tiny random model of each family, on disk."""

OTHER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "a3smoe": [
        {"frequency": "per_token", "temperature": 0.0},
        {"frequency": "per_activation", "gate": "renormalised"},
    ]
}
"""Options under which the contract must hold too, besides the defaults."""

CASES = [(name, options) for name in method_names() for options in [{}, *OTHER_OPTIONS.get(name, [])]]


@dataclass(frozen=True)
class Setting:
    """A method on a tiny federation."""

    method: Method
    material: assembly.Material
    state: Bundle

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


@pytest.fixture(scope="module", params=sorted(TINY))
def family_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return TINY[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join([case[0], *map(str, case[1].values())]))
def setting(request: pytest.FixtureRequest, family_folder: Path, tiny_data: Path) -> Setting:
    name, options = request.param
    checked = parse(config(family_folder, tiny_data, method={"name": name, **options}))
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    return Setting(method, material, method.init(material.model, material.budgets, Seeds(0).at(purpose="init")))


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
    if getattr(setting.method.config, "gate", "native") in ("native", setting.material.model.blocks[0].native_gate):
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
        asked = Asked(1, client.id, setting.method.expects(setting.state, download), client.budget.top_k)
        assert payload_problem(Payload(1, client.id, upload), asked) is None
        moved = [
            name for name, tensor in setting.state.tensors.items() if not torch.equal(tensor, upload.tensors[name])
        ]
        assert moved
        assert upload.meta["examples"] == len(setting.material.shards[client.id].examples)


def test_aggregation_is_pure_and_one_client_gets_its_update_back(setting: Setting) -> None:
    state, uploads = digest(setting.state), setting.uploads(0)
    content = digest(uploads[0].content)
    after = setting.method.aggregate(setting.state, uploads)
    assert digest(setting.state) == state
    assert digest(uploads[0].content) == content
    for name, tensor in after.tensors.items():
        assert torch.equal(tensor, uploads[0].content.tensors[name]), name
    again = setting.method.aggregate(setting.state, uploads)
    assert digest(again) == digest(after)


def test_clients_that_agree_are_not_changed_by_averaging(setting: Setting) -> None:
    [upload] = setting.uploads(0)
    twins = [upload, Payload(1, "twin", upload.content)]
    after = setting.method.aggregate(setting.state, twins)
    for name, tensor in after.tensors.items():
        torch.testing.assert_close(tensor, upload.content.tensors[name], rtol=1e-6, atol=1e-7)


def test_experts_nobody_used_keep_their_bits(setting: Setting) -> None:
    uploads = setting.uploads(0, 1)
    if ACTIVATION_COUNTS not in uploads[0].content.tensors:
        pytest.skip("this method does not count activations")
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
        assert torch.equal(after.tensors[name][3], setting.state.tensors[name][3]), name


def test_experts_without_tokens_keep_their_bits_in_training(setting: Setting) -> None:
    upload = setting.fit(0).upload
    untouched = (upload.tensors[ACTIVATION_COUNTS] == 0).nonzero().tolist()
    touched = (upload.tensors[ACTIVATION_COUNTS] > 0).nonzero().tolist()
    names = [name for name in setting.state.tensors if ".experts." in name and name.endswith("lora_B")]
    layers = [block.layer for block in setting.material.model.blocks]
    for name in names:
        layer = int(name.split(".")[1])
        for row, expert in untouched:
            if layers[row] == layer:
                assert torch.equal(upload.tensors[name][expert], setting.state.tensors[name][expert])
    moved = [
        bool(upload.tensors[f"layers.{layers[row]}.experts.down_proj.lora_B"][expert].any()) for row, expert in touched
    ]
    assert names
    assert any(moved)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
def test_the_exported_adapter_gives_the_deployed_logits_in_peft(
    setting: Setting, family_folder: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    after = setting.method.aggregate(setting.state, setting.uploads(0, 1, 2, 3))
    for name, data in setting.method.export(after, setting.material.model).items():
        (tmp_path / name).write_bytes(data)
    if getattr(setting.method.config, "gate", "native") != "native":
        pytest.skip("PEFT runs the checkpoint's own gate")
    native = next(budget for budget in setting.material.budgets if budget.top_k == setting.material.model.native_top_k)
    with setting.method.deploy(after, setting.material.model, native):
        ours = logits(setting)
    theirs_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(family_folder), tmp_path)
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
