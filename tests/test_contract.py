"""One suite that every method, engine and family found on disk must pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from builders import CLASSIFIER_VARIANTS, FAMILY_VARIANTS, save_tiny_family
from federations import bits, config, dense, write_data
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
)

import emberfed
from emberfed import assembly, federated, federated_experts
from emberfed.admission import Asked, payload_problem, survey_problem
from emberfed.clients import Budget, Client
from emberfed.config import RunConfig, parse
from emberfed.engine import engine_names, load_engine
from emberfed.errors import ConfigError, ModelError
from emberfed.federated_experts import ExpertTuningConfig
from emberfed.material import Material
from emberfed.method import Method, load_method, method_names
from emberfed.methods.dense_adapter import DenseAdapterConfig
from emberfed.methods.linear_probe import HeadConfig
from emberfed.models import lora, sparse_adapter, tuning_layout
from emberfed.models.families import families, load_family
from emberfed.models.head import is_head
from emberfed.models.lora import LoraConfig
from emberfed.models.sparse_adapter import SparseAdapterConfig
from emberfed.records import ACTIVATION_COUNTS, Bundle, FitResult, Json, Payload, Reply
from emberfed.sections import Section
from emberfed.seeds import Seeds
from emberfed.training import Trainer

TINY = (*FAMILY_VARIANTS, *CLASSIFIER_VARIANTS)
"""Families of which there is a tiny random model."""

OTHER_OPTIONS: dict[str, list[dict[str, Any]]] = {
    "a3smoe": [
        {"frequency": "per_token", "temperature": 0.0},
        {"frequency": "per_activation", "gate": "renormalised"},
    ],
    "fft_moe": [
        {"gate_aggregation": "fedavg", "balance": "none"},
        {"weighting": "activation", "balance": "switch", "router_z_coef": 0.01},
    ],
    "fmq": [{"bits": 8, "active_experts": "budget"}],
    "flux": [
        {"profile": "fresh", "profile_bits": None, "layer_budget": "uniform", "merge_weights": "frequency"},
        {"epsilon_first": 1.0, "epsilon_last": 1.0, "coverage": 1, "gate": "renormalised", "merging": "least_error"},
    ],
    "fmes": [{"dropped": "skip", "profile_bits": 8}],
    "flame": [{"rescale": "none"}, {"rescaler_start": "static", "frequency": "per_activation"}],
    "flexlora": [{"active_experts": "budget", "weighting": "activation"}, {"rank": 6}],
    "flora": [{"active_experts": "budget", "weighting": "activation", "temperature": 1.0}],
    "hetlora": [{"weighting": "data", "pruning": 0.5}, {"active_experts": "budget", "weighting": "activation"}],
    "homolora": [{"rank": "adapter"}, {"active_experts": "budget", "weighting": "activation", "gate": "renormalised"}],
}
"""Options under which the contract must hold too, besides the defaults."""

FEW_FAMILIES: Mapping[type[Section], tuple[str, ...]] = {
    LoraConfig: ("deepseek_v3", "olmoe"),
    SparseAdapterConfig: ("olmoe", "vit"),
    ExpertTuningConfig: ("mixtral", "olmoe"),
}
"""Families on which other options than the defaults are tried, by what is trained."""

PLAIN: Mapping[str, Any] = {
    "generation": AutoModelForCausalLM,
    "text_classification": AutoModelForSequenceClassification,
    "image_classification": AutoModelForImageClassification,
}
"""How transformers alone opens a checkpoint, by task."""


class Attach(Protocol):
    """Lets a model compute with an adapter, without going through any method."""

    def __call__(self, setting: Setting, upload: Bundle, tensors: Mapping[str, torch.Tensor]) -> Context: ...


Context = AbstractContextManager[Any]


@dataclass(frozen=True)
class Kind:
    """What is told apart by what a method trains.

    Attributes:
        zeros: How the names end of experts' tensors that are zero at first.
        attach: Lets a model compute with what a client sent.
        opened: Lets transformers' own model compute with the exported folder, without this package's.
    """

    zeros: str
    attach: Attach
    opened: Callable[[Any, Path], Context]


def lora_attached(setting: Setting, upload: Bundle, tensors: Mapping[str, torch.Tensor]) -> Context:
    model = setting.material.model
    if "rescaler" in upload.tensors:
        numbers = upload.tensors["rescaler"][:, None].unbind()
        layers = setting.state.meta["sparse_layers"]
        scales = {f"layers.{layer}.router.rescaler": s for layer, s in zip(layers, numbers, strict=True)}
        tensors = {**tensors, **scales}
    return lora.attached(model, tensors, setting.method.adapter.alpha)


def beside_attached(setting: Setting, upload: Bundle, tensors: Mapping[str, torch.Tensor]) -> Context:
    return sparse_adapter.attached(setting.material.model, tensors, upload.meta.get("adapter_top_k", 1))


def tuned_attached(setting: Setting, upload: Bundle, tensors: Mapping[str, torch.Tensor]) -> Context:
    """The experts of one client among those of the state."""
    layers = setting.state.meta["sparse_layers"]
    stacks, held = federated_experts.stacks_of(setting.state), federated_experts.held_rows(setting.state.meta)
    whole = tuning_layout.put_rows(stacks, held, tensors, federated_experts.rows(upload.meta["exploited"], layers))
    return lora.attached(setting.material.model, whole, setting.method.adapter.alpha)


def opened_by_peft(plain: Any, folder: Path) -> Context:
    return nullcontext(PeftModel.from_pretrained(plain, folder))


@contextmanager
def loaded(plain: Any, folder: Path) -> Iterator[Any]:
    with emberfed.load_adapter(plain, folder):
        yield plain


BESIDE = Kind(".up_proj", beside_attached, loaded)
KINDS: Mapping[type[Section], Kind] = {
    LoraConfig: Kind(".lora_B", lora_attached, opened_by_peft),
    SparseAdapterConfig: BESIDE,
    DenseAdapterConfig: BESIDE,
    HeadConfig: BESIDE,
    ExpertTuningConfig: Kind(".lora_B", tuned_attached, opened_by_peft),
}

IN_GROUPS = ("deepseek_v3",)
"""Families whose tiny model's routers choose among some groups of experts only."""

EXPERTS = {"model": "experts", "adapter": "adapter.experts"}
"""Where the tensors of the experts that a method counts are, by `Method.experts`."""


def refusal(family: str, method: str) -> str | None:
    """Return why a method refuses a family, if it does."""
    if method in ("a3smoe", "flame", "flux", "fmes", "fmq") and load_family(family).mixture is None:
        return rf"needs a model with experts, but {family} models are dense"
    if method == "fmd" and load_family(family).mixture is None:
        return rf"{family} models are dense"
    if method == "linear_probe" and load_family(family).head is None:
        return rf"trains a classifier's head, and {family} models have none"
    if method == "fmes" and family in IN_GROUPS:
        return r"choose groups of experts first"
    return None


CASES = [
    (family, name, options)
    for family in sorted(TINY)
    for name in method_names()
    if refusal(family, name) is None
    for options in [
        {},
        *(OTHER_OPTIONS.get(name, []) if family in FEW_FAMILIES.get(load_method(name).AdapterConfig, ()) else []),
    ]
]


EVERY_METHOD_ON = ("olmoe", "deepseek_v2", "llama", "vit")
"""Families unlike each other: `make test` asks every method of these, and some methods of all others."""
ON_EVERY_FAMILY = ("a3smoe", "fft_moe", "flux")


def case(family: str, name: str, options: Mapping[str, Any]) -> Any:
    """A case as pytest has it, with a mark on those that `make test-slow` asks."""
    often = family in EVERY_METHOD_ON or (name in ON_EVERY_FAMILY and not options)
    id_ = "-".join([family, name, *map(str, options.values())])
    return pytest.param((family, name, options), id=id_, marks=[] if often else [pytest.mark.slow])


@dataclass(frozen=True)
class Setting:
    """A method on a tiny federation."""

    method: Method
    kind: Kind
    material: Material
    state: Bundle
    folder: Path
    fits: dict[int, FitResult] = field(default_factory=dict)

    def download(self, client: int) -> Payload:
        return self.method.dispatch(self.state, self.material.clients[client], 1)

    def fit(self, client: int, download: Payload) -> FitResult:
        who = self.material.clients[client]
        seeds = Seeds(0).at(round=1, client=who.id)
        return self.method.fit(self.material.model, download, who, self.material.shards[who.id], Bundle(), seeds)

    def answer(self, client: int) -> FitResult:
        """Return what a client makes of the first round; it is always the same, so that once is enough."""
        if client not in self.fits:
            self.fits[client] = self.fit(client, self.download(client))
        return self.fits[client]

    def upload(self, client: int) -> Payload:
        return Payload(1, self.material.clients[client].id, self.answer(client).upload)

    def after(self) -> Bundle:
        """Return the state after a round of all clients."""
        return self.method.aggregate(self.state, [self.upload(client) for client in range(4)])

    def budget(self, tier: str) -> Budget:
        return next(budget for budget in self.material.budgets if budget.tier == tier)

    def native_budget(self) -> Budget:
        """The checkpoint's own K, and the largest k of a sparse adapter, with which it is exported."""
        native = self.material.model.native_top_k
        return replace(next(budget for budget in self.material.budgets if budget.top_k == native), adapter_top_k=4)

    def deployed(self, state: Bundle, budget: Budget) -> torch.Tensor:
        with self.method.deploy(state, self.material.model, budget) as model:
            return logits(model.lm, self)


def test_every_family_has_a_tiny_model_here() -> None:
    assert set(families()) == set(TINY)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model of each family, made when it is first asked for."""
    return cache(lambda family: save_tiny_family(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def data_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Data of each task, made when it is first asked for."""
    return cache(lambda task: write_data(task, tmp_path_factory.mktemp(task)))


Made = Callable[[str], Path]


@pytest.fixture(scope="module", params=[case(*one) for one in CASES])
def setting(request: pytest.FixtureRequest, folders: Made, data_of: Made) -> Setting:
    family, name, options = request.param
    checked = checked_config(family, folders, data_of, {"name": name, **options})
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    state = method.init(material.model, material.budgets, Seeds(0).at(purpose="init"))
    state = assigned(method, material, state)
    return Setting(method, KINDS[method.AdapterConfig], material, state, folders(family))


def assigned(method: Method, material: Material, state: Bundle) -> Bundle:
    """The state at the beginning of a first round, once those clients are surveyed that the method wants to hear of."""
    surveys = []
    for client in method.unsurveyed(state, material.clients):
        seeds = Seeds(0).at(round=1, client=client.id)
        survey = method.survey(material.model, client, material.shards[client.id], Bundle(), seeds).upload
        specs = method.survey_expects(state)
        surveys.append(Payload(1, client.id, survey))
        reply = Reply(1, client.id, surveys[-1].to_bytes(), {})
        assert survey_problem(reply, 1, specs) is None
    return method.assign(state, material.clients, surveys, 1)


def checked_config(family: str, folders: Made, data_of: Made, method: dict[str, Any]) -> RunConfig:
    task = load_family(family).task
    values = config(folders(family), data_of(task), method=method, data={"task": task})
    if family == "qwen2":  # transformers takes any tokenizer beside a Qwen2 model for Qwen2's own kind
        values["model"]["tokenizer"] = str(folders("olmoe"))
    if load_family(family).mixture is None:
        values["clients"]["tiers"] = dense(values["clients"]["tiers"])
    return parse(values)


def begin(checked: RunConfig) -> None:
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    method.init(material.model, material.budgets, Seeds(0))


@pytest.mark.parametrize("name", [name for name in method_names() if refusal("llama", name)])
def test_methods_refuse_models_they_cannot_train(name: str, folders: Made, data_of: Made) -> None:
    checked = checked_config("llama", folders, data_of, {"name": name})
    with pytest.raises((ConfigError, ModelError), match=refusal("llama", name)):
        begin(checked)


@pytest.mark.parametrize("family", IN_GROUPS)
def test_fmes_skips_where_routers_cannot_choose_again(family: str, folders: Made, data_of: Made) -> None:
    for dropped in ("reroute", "skip"):
        checked = checked_config(family, folders, data_of, {"name": "fmes", "dropped": dropped})
        material = assembly.gather(checked)
        method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
        if dropped == "reroute":
            with pytest.raises(ConfigError, match=r"choose groups of experts first.*method.dropped=skip"):
                method.init(material.model, material.budgets, Seeds(0))
            continue
        state = method.init(material.model, material.budgets, Seeds(0))
        client = material.clients[0]
        download = method.dispatch(state, client, 1)
        shard = material.shards[client.id]
        assert method.fit(material.model, download, client, shard, Bundle(), Seeds(0)).upload.tensors


@pytest.mark.parametrize("name", method_names())
def test_it_says_what_it_is(name: str) -> None:
    method = load_method(name)
    assert method.title
    assert method.paper
    assert method.Config.__doc__
    assert method.AdapterConfig in KINDS


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


def logits(lm: Any, setting: Setting) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) + 3
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if setting.material.model.task == "image_classification":
        given = {"pixel_values": torch.linspace(-1, 1, 384).view(2, 3, 8, 8)}
    with torch.inference_mode():
        answer: torch.Tensor = lm(**given).logits.clone()
    return answer


def test_an_answer_depends_on_the_downloads_bytes_alone(setting: Setting) -> None:
    """Not on objects of this process, nor on what the global random stream holds."""
    assert digest(Bundle.from_bytes(setting.state.to_bytes())) == digest(setting.state)
    download = setting.download(0)
    assert (download.round, download.client) == (1, setting.material.clients[0].id)
    assert download.content.meta["top_k"] >= 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        other = setting.fit(0, Payload.from_bytes(download.to_bytes()))
    assert digest(setting.answer(0).upload) == digest(other.upload)
    assert digest(setting.answer(0).memory) == digest(other.memory)


def test_the_initial_state_changes_nothing_at_the_native_k(setting: Setting) -> None:
    model = setting.material.model
    before, deployed = logits(model.lm, setting), setting.deployed(setting.state, setting.native_budget())
    gate = getattr(setting.method.config, "gate", "native")
    if gate in ("native", *{block.native_gate for block in model.blocks}):
        assert torch.equal(before, deployed)
    else:
        assert not torch.equal(before, deployed), "renormalising changes a model that does not renormalise"


def test_model_inputs_and_global_randomness_are_left_as_found(setting: Setting) -> None:
    """By training, by deploying at every budget, and by a failure while deployed."""
    model, state, download = model_digest(setting), digest(setting.state), setting.download(0)
    content, stream = digest(download.content), torch.get_rng_state()
    setting.fit(0, download)
    for budget in setting.material.budgets:
        with setting.method.deploy(setting.state, setting.material.model, budget) as deployed:
            assert deployed.top_k == budget.top_k
            logits(deployed.lm, setting)
    with (
        pytest.raises(RuntimeError, match="trouble"),
        setting.method.deploy(setting.state, setting.material.model, setting.budget("small")),
    ):
        raise RuntimeError("trouble")
    assert model_digest(setting) == model
    assert digest(setting.state) == state
    assert digest(download.content) == content
    assert torch.equal(torch.get_rng_state(), stream)


def test_an_honest_upload_is_admitted_and_moves_something(setting: Setting) -> None:
    for number, client in enumerate(setting.material.clients):
        download, upload = setting.download(number), setting.upload(number)
        meta = download.content.meta
        expected = setting.method.expects(setting.state, download)
        asked = Asked(1, client.id, expected, meta["top_k"], meta.get("adapter_top_k"), meta.get("exploited"))
        assert payload_problem(upload, asked) is None
        tensors = upload.content.tensors
        heads = [name for name in tensors if is_head(name)]
        assert bool(heads) == (setting.material.model.head is not None)
        assert not any(torch.equal(tensors[name], setting.state.tensors[name]) for name in heads)
        grown = [bool(tensor.any()) for name, tensor in tensors.items() if name.endswith(setting.kind.zeros)]
        assert any(grown) or (not grown and heads)
        assert upload.content.meta["examples"] == len(setting.material.shards[client.id].examples)


def as_trained(setting: Setting, upload: Bundle, budget: Budget) -> torch.Tensor:
    """Logits of the adapter a client sent, at a budget, without going through the method."""
    model = setting.material.model
    gate: Any = getattr(setting.method.config, "gate", "native")
    tensors = federated.adapter_of(upload.tensors)
    with model.active_experts(budget.top_k, gate), setting.kind.attach(setting, upload, tensors):
        return logits(model.lm, setting)


def test_aggregation_is_pure_and_one_client_gets_its_update_back(setting: Setting) -> None:
    """So do two that agree."""
    upload, budget = setting.upload(0), setting.material.clients[0].budget
    state, content = digest(setting.state), digest(upload.content)
    after = setting.method.aggregate(setting.state, [upload])
    assert digest(setting.state) == state
    assert digest(upload.content) == content
    assert digest(setting.method.aggregate(setting.state, [upload])) == digest(after)
    trained = as_trained(setting, upload.content, budget)
    torch.testing.assert_close(setting.deployed(after, budget), trained, rtol=1e-4, atol=2e-5)
    if isinstance(setting.method.adapter, ExpertTuningConfig):  # these few tokens may all go to other experts
        assert digest(Bundle(federated.adapter_of(after.tensors))) != digest(
            Bundle(federated.adapter_of(setting.state.tensors))
        )
    else:
        assert not torch.allclose(setting.deployed(setting.state, budget), trained, rtol=1e-4, atol=2e-5)
    both = setting.method.aggregate(setting.state, [upload, Payload(1, "twin", upload.content)])
    torch.testing.assert_close(setting.deployed(both, budget), trained, rtol=1e-4, atol=2e-5)


def product(tensors: Mapping[str, torch.Tensor], name: str, expert: int) -> torch.Tensor:
    """B A of one expert, given the name of either factor."""
    path = name.rpartition(".")[0]
    return tensors[f"{path}.lora_B"][expert] @ tensors[f"{path}.lora_A"][expert]


def experts_of(setting: Setting, layer: int) -> list[str]:
    """Names of the state's tensors that are stacked over counted experts of a layer."""
    start = f"layers.{layer}.{EXPERTS[setting.method.experts]}."
    return [name for name in setting.state.tensors if name.startswith(start)]


def test_experts_nobody_used_keep_what_they_were(setting: Setting) -> None:
    uploads = [setting.upload(0), setting.upload(1)]
    if ACTIVATION_COUNTS not in uploads[0].content.tensors:
        assert not setting.state.meta["sparse_layers"]
        pytest.skip("there are no experts")
    silenced = []
    for upload in uploads:
        counts = upload.content.tensors[ACTIVATION_COUNTS].clone()
        counts[0, -1] = 0
        tensors = {**upload.content.tensors, ACTIVATION_COUNTS: counts}
        silenced.append(Payload(1, upload.client, Bundle(tensors, upload.content.meta)))
    after = setting.method.aggregate(setting.state, silenced)
    if "exploited" in uploads[0].content.meta:
        only_tuned_experts_moved(setting, after, uploads)
        return
    names = experts_of(setting, setting.state.meta["sparse_layers"][0])
    assert names
    for name in names:
        before, now = setting.state.tensors[name][-1], after.tensors[name][-1]
        if before.shape == now.shape:
            assert torch.equal(now, before), name
        else:
            assert torch.equal(product(after.tensors, name, -1), product(setting.state.tensors, name, -1)), name


def only_tuned_experts_moved(setting: Setting, after: Bundle, uploads: list[Payload]) -> None:
    """Of methods that tune some experts, nobody uses those that nobody was told to tune."""
    tuned = [upload.content.meta["exploited"] for upload in uploads]
    kept = 0
    for row, layer in enumerate(setting.state.meta["sparse_layers"]):
        for name in experts_of(setting, layer):
            for expert, (before, now) in enumerate(zip(setting.state.tensors[name], after.tensors[name], strict=True)):
                if not any(expert in theirs[row] for theirs in tuned):
                    assert torch.equal(before, now), (name, expert)
                    kept += 1
    assert kept


def test_experts_without_tokens_keep_their_bits_in_training(setting: Setting) -> None:
    if not setting.state.meta["sparse_layers"]:
        pytest.skip("there are no experts")
    tensors = setting.upload(0).content.tensors
    used_LE = tensors[ACTIVATION_COUNTS] > 0
    moved = []
    for row, layer in enumerate(setting.state.meta["sparse_layers"]):
        names = [name for name in experts_of(setting, layer) if name.endswith(setting.kind.zeros)]
        assert names
        tuned = setting.answer(0).upload.meta.get("exploited")
        ids = list(range(used_LE.shape[1])) if tuned is None else tuned[row]
        for name in names if ids else ():
            any_n = tensors[name].flatten(1).any(dim=1)
            assert not any_n[~used_LE[row, ids]].any(), f"{name} is zero at first"
            moved.append(bool(any_n.any()))
    assert any(moved)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # raised inside PEFT
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match any targeted module:RuntimeWarning")
def test_the_exported_adapter_gives_the_deployed_logits_elsewhere(setting: Setting, tmp_path: Path) -> None:
    """PEFT opens a LoRA, and `emberfed.load_adapter` what stands beside the FFN, on transformers' own model."""
    after, budget = setting.after(), setting.native_budget()
    for name, data in setting.method.export(after, setting.material.model).items():
        (tmp_path / name).write_bytes(data)
    if getattr(setting.method.config, "gate", "native") != "native":
        pytest.skip("PEFT runs the checkpoint's own gate")
    if setting.state.meta.get("rescale") == "learnable":
        pytest.skip("PEFT has no place for a rescaler")
    ours = setting.deployed(after, budget)
    plain = PLAIN[setting.material.model.task].from_pretrained(setting.folder)
    with setting.kind.opened(plain, tmp_path) as model:
        theirs = logits(model, setting)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_clients_own_model(setting: Setting) -> None:
    """Of a client that comes late it is the deployed one, if it is sent all of it; of one with a memory it runs, too.

    Model, memory, download and global randomness are as found.
    """
    method, base, after = setting.method, setting.material.model, setting.after()
    before, stream = model_digest(setting), torch.get_rng_state()
    late = Client("late", setting.budget("large"), 5)
    returning = setting.material.clients[0]
    own: dict[str, torch.Tensor] = {}
    for client, memory in ((late, Bundle()), (returning, setting.answer(0).memory)):
        download = method.dispatch(after, client, 2)
        contents = digest(download.content), digest(memory)
        with method.personal(base, download, client, memory) as model:
            assert model.top_k == client.budget.top_k
            runs_base = model is base
            own[client.id] = logits(model.lm, setting)
        assert (digest(download.content), digest(memory)) == contents
        assert own[client.id].isfinite().all()
        if client is late:
            sent, whole = (federated.adapter_of(bundle.tensors) for bundle in (download.content, after))
            sends_all = all(sent[name].shape == tensor.shape for name, tensor in whole.items())
    assert model_digest(setting) == before
    assert torch.equal(torch.get_rng_state(), stream)
    if isinstance(method.adapter, ExpertTuningConfig) or not runs_base:
        assert not torch.equal(own["late"], setting.deployed(after, late.budget)), "it holds fewer experts, or bits"
    elif sends_all:
        torch.testing.assert_close(own["late"], setting.deployed(after, late.budget), rtol=1e-5, atol=1e-5)
    else:
        assert setting.method.config.rank > 4, "the tier's rank is below the global one"


ELSEWHERE = {"pool": {"processes": 2}, "flower-simulation": {"processes": 2}}
"""Engines whose clients are in processes of their own, which take long to start, with their options; tests of their own
ask them for the bits of the local one."""
DEPLOYED = [name for name in engine_names() if load_engine(name).deployed]
"""Their clients have data of their own: tests/test_deployment.py."""
PAIRS = [
    pytest.param(method, engine, marks=[pytest.mark.slow] if engine in ELSEWHERE else [])
    for method in method_names()
    for engine in engine_names()
    if engine != "local" and engine not in DEPLOYED
]


@pytest.mark.parametrize(("method", "engine"), PAIRS)
def test_every_engine_gives_the_same_bits(
    method: str, engine: str, folders: Made, data_of: Made, tmp_path: Path, local_runs: Callable[[str], Same]
) -> None:
    values = same_config(method, folders, data_of)
    run = emberfed.run({**values, "engine": {"name": engine, **ELSEWHERE.get(engine, {})}}, output=tmp_path / engine)
    personal = [line for line in run.metrics() if line["event"] == "personal"]
    assert (bits(run.path), personal) == local_runs(method)
    assert len(personal) == 2 * 4


Same = tuple[dict[str, str], list[Json]]


def same_config(method: str, folders: Made, data_of: Made) -> dict[str, Any]:
    family = next(family for family in ("vit", "olmoe") if refusal(family, method) is None)
    task = load_family(family).task
    return config(
        folders(family),
        data_of(task),
        method={"name": method},
        data={"task": task, "client_test_share": 0.3},
        model={"threads": 1},
        training={"rounds": 2},
        evaluation={"every": 0, "max_examples": 2},
    )


@pytest.fixture(scope="module")
def local_runs(folders: Made, data_of: Made, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Same]:
    """What the local engine makes of a method, run once."""
    known: dict[str, Same] = {}

    def made(method: str) -> Same:
        if method not in known:
            values = same_config(method, folders, data_of)
            run = emberfed.run(values, output=tmp_path_factory.mktemp("local") / method)
            known[method] = bits(run.path), [line for line in run.metrics() if line["event"] == "personal"]
        return known[method]

    return made
