"""The LoRA methods one by one: what each does beyond the contract, identities between them, and what they refuse."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import bits, config

import emberfed
from emberfed import assembly, federated
from emberfed.clients import Budget, Client
from emberfed.config import parse
from emberfed.errors import ClientError, ConfigError
from emberfed.method import Method, load_method, method_names
from emberfed.models import lora
from emberfed.models.foundation_model import FoundationModel
from emberfed.penalties import tail_product
from emberfed.records import ACTIVATION_COUNTS, Bundle, Payload
from emberfed.seeds import Seeds
from emberfed.training import Trainer

IDS = torch.arange(24).view(2, 12) + 3
LORA_METHODS = [name for name in method_names() if load_method(name).AdapterConfig is lora.LoraConfig]


class World:
    """A method, its state, and clients that take part one round after another."""

    def __init__(self, model: Path, data: Path, /, **sections: Any) -> None:
        checked = parse(config(model, data, **sections))
        self.material = assembly.gather(checked)
        self.model = self.material.model
        self.method: Method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
        self.state = self.method.init(self.model, self.material.budgets, Seeds(0).at(purpose="init"))
        self.clients = {client.id: client for client in self.material.clients}
        self.memories: dict[str, Bundle] = {}

    def fit(self, round: int, id_: str) -> Payload:
        client, seeds = self.clients[id_], Seeds(0).at(round=round, client=id_)
        download = self.method.dispatch(self.state, client, round)
        memory = self.memories.get(id_, Bundle())
        result = self.method.fit(self.model, download, client, self.material.shards[id_], memory, seeds)
        self.memories[id_] = result.memory
        return Payload(round, id_, result.upload)

    def play(self, round: int, *ids: str) -> list[Payload]:
        uploads = [self.fit(round, id_) for id_ in ids]
        self.state = self.method.aggregate(self.state, uploads)
        return uploads

    def logits(self, budget: Budget | None = None) -> torch.Tensor:
        with self.method.deploy(self.state, self.model, budget or self.material.budgets[0]):
            return logits(self.model)


def logits(model: FoundationModel) -> torch.Tensor:
    with torch.inference_mode():
        answer: torch.Tensor = model.lm(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.clone()
    return answer


def effect(tensors: Mapping[str, torch.Tensor], alpha: float) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each weight, formed in float64."""
    paths = [name.removesuffix(".lora_A") for name in tensors if name.endswith(".lora_A")]
    pairs = {path: (tensors[f"{path}.lora_A"].double(), tensors[f"{path}.lora_B"].double()) for path in paths}
    return {path: alpha / a.shape[-2] * b @ a for path, (a, b) in pairs.items()}


# Their server state and client memory differ most; the others take the same paths, and are asked by `make test-slow`.
_OF_THEIR_OWN = ("flora", "hetlora")


@pytest.mark.parametrize(
    "method",
    [name if name in _OF_THEIR_OWN else pytest.param(name, marks=pytest.mark.slow) for name in LORA_METHODS],
)
def test_changing_cohorts_cut_and_resumed_give_the_same_bits(
    method: str, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Two of four clients in each round: some come late, some come back; what they keep is on disk."""

    def values(rounds: int) -> dict[str, Any]:
        return config(
            tiny_model_folder,
            tiny_data,
            method={"name": method},
            clients={"per_round": 2},
            training={"rounds": rounds, "max_steps": 1},
            evaluation={"every": 0, "max_examples": 2},
        )

    whole = emberfed.run(values(4), output=tmp_path / "whole")
    cut = emberfed.run(values(2), output=tmp_path / "cut")
    emberfed.resume(cut.path, rounds=4)
    assert bits(whole.path) == bits(cut.path)
    told = [line for line in whole.metrics() if line["event"] == "round"]
    cohorts = [tuple(line["replied"]) for line in told]
    assert len(set(cohorts)) > 1, "the same clients every time would show nothing"
    assert all(not line["failed"] and not line["refused"] for line in told)


def run_bits(model: Path, data: Path, folder: Path, **method: Any) -> dict[str, str]:
    values = config(model, data, method=method, evaluation={"every": 0, "max_examples": 2})
    return bits(emberfed.run(values, output=folder).path)


def test_a3smoe_is_homolora_at_the_budgets_k_weighted_by_activation(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    options = {"rank": "adapter", "active_experts": "budget", "weighting": "activation", "temperature": 3.0}
    one = run_bits(tiny_model_folder, tiny_data, tmp_path / "a", name="homolora", **options)
    other = run_bits(tiny_model_folder, tiny_data, tmp_path / "b", name="a3smoe", temperature=3.0)
    third = run_bits(
        tiny_model_folder, tiny_data, tmp_path / "c",
        name="flame", temperature=3.0, frequency="per_activation_over_k", rescale="none",
    )  # fmt: skip
    adapters = [
        {name: digest for name, digest in run.items() if "adapter_model" in name} for run in (one, other, third)
    ]
    assert adapters[0] == adapters[1] == adapters[2]
    assert len(adapters[0]) == 3


# Homo-LoRA ---------------------------------------------------------------------------------------------------------


def test_homolora_gives_everybody_the_lowest_rank_or_the_adapters(tiny_model_folder: Path, tiny_data: Path) -> None:
    for method, rank in (({"name": "homolora"}, 2), ({"name": "homolora", "rank": "adapter"}, 5)):
        world = World(tiny_model_folder, tiny_data, method=method, adapter={"rank": 5})
        for client in world.clients.values():
            sent = world.method.dispatch(world.state, client, 1).content.tensors
            assert {tensor.shape[-2] for name, tensor in sent.items() if name.endswith("lora_A")} == {rank}


@pytest.mark.parametrize("method", ["flexlora", "flora", "hetlora", "homolora"])
def test_baselines_train_at_the_native_k_unless_told_to_use_the_budget(
    method: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    for active, expected in (("native", {2}), ("budget", {1, 2, 4})):
        world = World(tiny_model_folder, tiny_data, method={"name": method, "active_experts": active})
        uploads = world.play(1, *world.clients)
        assert {upload.content.meta["top_k"] for upload in uploads} == expected
        for upload in uploads:
            counts, meta = upload.content.tensors[ACTIVATION_COUNTS], upload.content.meta
            assert counts.sum(dim=1).tolist() == [meta["tokens"] * meta["top_k"]] * 2


# HetLoRA -----------------------------------------------------------------------------------------------------------


def rank_of(tensors: Mapping[str, torch.Tensor]) -> int:
    """The one rank of an adapter."""
    sizes = {tensor.shape[-2] for name, tensor in tensors.items() if name.endswith("lora_A")}
    assert sizes == {tensor.shape[-1] for name, tensor in tensors.items() if name.endswith("lora_B")}
    assert len(sizes) == 1
    return sizes.pop()


def test_hetlora_prunes_where_the_tail_shrank_and_remembers(tiny_model_folder: Path, tiny_data: Path) -> None:
    """In round 1 tails grow from zero, so nobody prunes; a strong regulariser makes some shrink later.

    Kept ranks are max(lowest tier's 2, floor(0.8 r)): 2 of 2 (nothing to prune), 2 of 3, 3 of 4.
    """
    method = {"name": "hetlora", "pruning": 0.8, "regularisation": 1e3}
    world = World(tiny_model_folder, tiny_data, method=method, training={"learning_rate": 1e-3})
    kept = {2: 2, 3: 2, 4: 3}
    ranks = {id_: client.budget.rank or 0 for id_, client in world.clients.items()}
    shrunk = {True: 0, False: 0}
    for round in (1, 2, 3):
        downloads = {id_: world.method.dispatch(world.state, client, round) for id_, client in world.clients.items()}
        assert {id_: rank_of(download.content.tensors) for id_, download in downloads.items()} == ranks
        for upload in world.play(round, *world.clients):
            before, id_ = downloads[upload.client].content.tensors, upload.client
            sent = rank_of(upload.content.tensors)
            assert sent in (ranks[id_], kept[ranks[id_]])
            if sent == ranks[id_]:
                assert tail_product(upload.content.tensors, kept[sent]) >= tail_product(before, kept[sent])
            shrunk[sent < ranks[id_]] += 1
            ranks[id_] = sent
        assert round > 1 or shrunk == {True: 0, False: 4}
        assert world.state.meta["ranks"] == ranks
        assert rank_of(federated.adapter_of(world.state.tensors)) == 4
    assert shrunk[True] >= 1


def test_hetlora_without_pruning_keeps_every_rank(tiny_model_folder: Path, tiny_data: Path) -> None:
    method = {"name": "hetlora", "pruning": 1.0, "regularisation": 1e3}
    world = World(tiny_model_folder, tiny_data, method=method, training={"learning_rate": 1e-3})
    for round in (1, 2, 3):
        world.play(round, *world.clients)
    assert world.state.meta["ranks"] == {id_: client.budget.rank for id_, client in world.clients.items()}


def test_a_cut_keeps_the_share_its_components_had(tiny_model_folder: Path, tiny_data: Path) -> None:
    """alpha / r grows as the rank falls; a client of rank 2 of 4 must not see its components twice as strong."""
    world = World(tiny_model_folder, tiny_data, method={"name": "hetlora"})
    world.play(1, *world.clients)
    client = next(client for client in world.clients.values() if client.budget.rank == 2)
    sent = effect(world.method.dispatch(world.state, client, 2).content.tensors, 4.0)
    for path, delta in sent.items():
        a, b = (world.state.tensors[f"{path}.lora_{factor}"].double() for factor in "AB")
        torch.testing.assert_close(delta, 4.0 / 4 * b[..., :2] @ a[..., :2, :], rtol=1e-5, atol=1e-8)


# FlexLoRA ----------------------------------------------------------------------------------------------------------


def test_flexlora_sends_the_best_approximation_of_the_mean(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flexlora", "rank": 8})
    uploads = world.play(1, *world.clients)
    examples = sum(upload.content.meta["examples"] for upload in uploads)
    paths = [name.removesuffix(".lora_A") for name in world.state.tensors if name.endswith("q_proj.lora_A")]
    client = next(client for client in world.clients.values() if client.budget.rank == 2)
    sent = effect(world.method.dispatch(world.state, client, 2).content.tensors, 4.0)
    assert paths
    for path in paths:
        mean = sum(
            upload.content.meta["examples"] / examples * effect(upload.content.tensors, 4.0)[path] for upload in uploads
        )
        assert isinstance(mean, torch.Tensor)
        u, s, vh = torch.linalg.svd(mean)
        torch.testing.assert_close(sent[path], u[:, :2] * s[:2] @ vh[:2], rtol=1e-4, atol=1e-7)


# FLoRA -------------------------------------------------------------------------------------------------------------


def test_flora_is_the_base_plus_every_rounds_mean(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Two rounds with different cohorts: c3 comes late, c0 comes back. The oracle adds dense means up."""
    world = World(tiny_model_folder, tiny_data, method={"name": "flora"})
    total: dict[str, torch.Tensor] = {}
    for round, cohort in ((1, ("c0", "c1")), (2, ("c1", "c2")), (3, ("c0", "c3"))):
        uploads = world.play(round, *cohort)
        examples = sum(upload.content.meta["examples"] for upload in uploads)
        counts = sum(upload.content.tensors[ACTIVATION_COUNTS] for upload in uploads)
        assert isinstance(counts, torch.Tensor)
        for upload in uploads:
            share = upload.content.meta["examples"] / examples
            for path, delta in effect(upload.content.tensors, 4.0).items():
                if ".experts." in path:
                    layer = int(path.split(".")[1])
                    delta = delta * (counts[layer] > 0)[:, None, None]
                total[path] = total.get(path, torch.zeros_like(delta)) + share * delta
    held = world.state.tensors
    for path, expected in total.items():
        found = 4.0 * held[f"{path}.lora_B"].double() @ held[f"{path}.lora_A"].double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    everything = {path.removesuffix(".lora_A") for path in held if path.endswith(".lora_A")}
    assert everything == set(total)
    # Each client holds what it merged, so that all of them have the server's stack but for the last round's part.
    assert held["layers.0.self_attn.q_proj.lora_A"].shape[0] == 1 + sum(
        world.clients[id_].budget.rank or 0 for id_ in ("c0", "c1", "c1", "c2", "c0", "c3")
    )
    for id_ in ("c0", "c3"):
        for name, tensor in world.memories[id_].tensors.items():
            columns = tensor.shape[-2] if name.endswith("lora_A") else tensor.shape[-1]
            same = held[name][..., :columns, :] if name.endswith("lora_A") else held[name][..., :columns]
            assert torch.equal(tensor, same), name


def test_flora_sends_only_what_is_missing_and_says_when_the_memory_is_gone(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flora"})
    world.play(1, "c0", "c1")
    name = "layers.0.self_attn.q_proj.lora_A"

    def columns(id_: str) -> int:
        return int(world.method.dispatch(world.state, world.clients[id_], 2).content.tensors[name].shape[0])

    whole = world.state.tensors[name].shape[0]
    assert columns("c0") == whole - 1
    assert columns("c2") == whole
    world.memories["c0"] = Bundle()
    with pytest.raises(ClientError, match=r"gone from its memory \(0 of 1 components are there\); restore"):
        world.fit(2, "c0")


def test_flora_starts_from_an_adapter(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    first = emberfed.run(
        config(tiny_model_folder, tiny_data, evaluation={"every": 0, "max_examples": 2}), output=tmp_path / "first"
    )
    adapter = {"start_from": str(first.path / "final")}
    flora = World(tiny_model_folder, tiny_data, method={"name": "flora"}, adapter=adapter)
    a3smoe = World(tiny_model_folder, tiny_data, method={"name": "a3smoe"}, adapter=adapter)
    torch.testing.assert_close(flora.logits(), a3smoe.logits(), rtol=1e-4, atol=1e-5)


def test_a_trained_router_is_averaged_by_every_method(tiny_model_folder: Path, tiny_data: Path) -> None:
    for method in LORA_METHODS:
        world = World(tiny_model_folder, tiny_data, method={"name": method}, adapter={"router": True})
        before = world.state.tensors["layers.1.router.weight"]
        for round in (1, 2):
            uploads = world.play(round, "c0", "c1")
            shares = [upload.content.meta["examples"] for upload in uploads]
            sent = [upload.content.tensors["layers.1.router.weight"] for upload in uploads]
            expected = sum(n / sum(shares) * tensor for n, tensor in zip(shares, sent, strict=True))
            assert isinstance(expected, torch.Tensor)
            torch.testing.assert_close(world.state.tensors["layers.1.router.weight"], expected, rtol=1e-5, atol=1e-6)
        assert not torch.equal(world.state.tensors["layers.1.router.weight"], before)


# FLAME -------------------------------------------------------------------------------------------------------------


def test_the_rescaler_multiplies_the_whole_routed_output(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Experts frozen and LoRA together: the block's output with s is s times its output without."""
    world = World(tiny_model_folder, tiny_data, method={"name": "flame"})
    world.play(1, *world.clients)
    tensors = federated.adapter_of(world.state.tensors)

    def outputs(extra: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        """What each block adds to the stream, its input being the same for the first block and up to the scaled one."""
        seen: list[torch.Tensor] = []
        with ExitStack() as stack:
            for block in world.model.blocks:
                hook = block.module.register_forward_hook(lambda _, __, y: seen.append(y[0] if type(y) is tuple else y))
                stack.callback(hook.remove)
            stack.enter_context(world.model.active_experts(1))
            stack.enter_context(lora.attached(world.model, {**tensors, **extra}, 4.0))
            logits(world.model)
        return seen

    plain, scaled = outputs({}), outputs({"layers.1.router.rescaler": torch.tensor([1.7])})
    assert torch.equal(scaled[0], plain[0])
    torch.testing.assert_close(scaled[1], 1.7 * plain[1], rtol=1e-5, atol=1e-7)


def test_the_rescalers_gradient_is_the_slope_of_the_loss(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flame"})
    world.play(1, *world.clients)
    tensors = federated.adapter_of(world.state.tensors)
    name = "layers.0.router.rescaler"

    def loss(value: float) -> tuple[float, float]:
        extra = {name: torch.tensor([value])}
        with world.model.active_experts(1), lora.attached(world.model, {**tensors, **extra}, 4.0) as adapter:
            total = world.model.lm(input_ids=IDS, labels=IDS).loss
            total.backward()
            gradient = adapter.parameters[name].grad
        assert gradient is not None
        return float(total.detach().double()), float(gradient)

    step = 0.05
    slope = (loss(1.3 + step)[0] - loss(1.3 - step)[0]) / (2 * step)
    assert loss(1.3)[1] == pytest.approx(slope, rel=2e-2)
    assert abs(slope) > 1e-4


def test_rescalers_are_kept_by_clients_and_shared_among_one_k_only(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flame"})
    of_k: dict[int, list[str]] = {}
    for id_, client in world.clients.items():
        of_k.setdefault(client.budget.top_k, []).append(id_)
    pair, alone = of_k[1], of_k[4][0]
    uploads = world.play(1, *pair, alone)
    sent = {upload.client: upload.content for upload in uploads}
    shares = [sent[id_].meta["examples"] for id_ in pair]
    expected = sum(n / sum(shares) * sent[id_].tensors["rescaler"] for n, id_ in zip(shares, pair, strict=True))
    torch.testing.assert_close(world.state.tensors["rescaler.top_k_1"], expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        world.state.tensors["rescaler.top_k_4"], sent[alone].tensors["rescaler"], rtol=1e-6, atol=1e-7
    )
    assert torch.equal(world.state.tensors["rescaler.top_k_2"], torch.ones(2)), "nobody of that K took part"
    assert not torch.equal(world.state.tensors["rescaler.top_k_1"], torch.ones(2))
    # A client goes on with its own, whatever it is sent; without a memory, with the mean of its K.
    own = {id_: world.memories[id_].tensors["rescaler"] for id_ in pair}
    assert torch.equal(own[pair[0]], sent[pair[0]].tensors["rescaler"])
    kept = world.fit(2, pair[0]).content.tensors["rescaler"]
    world.memories[pair[0]] = Bundle({"rescaler": torch.full((2,), 3.0)})
    assert (world.fit(2, pair[0]).content.tensors["rescaler"] > 2.5).all()
    world.memories[pair[0]] = Bundle()
    fresh = world.fit(2, pair[0]).content.tensors["rescaler"]
    assert (kept < 2.5).all()
    assert not torch.equal(fresh, kept)


def test_a_rescaler_serves_its_own_k_in_evaluation(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flame"})
    world.play(1, *world.clients)
    tensors = federated.adapter_of(world.state.tensors)
    for top_k in (1, 2, 4, 3):
        s = world.state.tensors.get(f"rescaler.top_k_{top_k}", torch.ones(2))
        by_layer = {f"layers.{layer}.router.rescaler": s[layer : layer + 1] for layer in (0, 1)}
        with world.model.active_experts(top_k), lora.attached(world.model, {**tensors, **by_layer}, 4.0):
            expected = logits(world.model)
        assert torch.equal(world.logits(Budget("any", top_k)), expected)


@pytest.mark.parametrize("rescale", ["static", "mass"])
def test_fixed_rescalers_are_those_of_the_routing(rescale: Any, tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flame", "rescale": rescale})
    uploads = world.play(1, *world.clients)
    assert not any("rescaler" in name for upload in uploads for name in upload.content.tensors)
    with world.model.active_experts(1, "native", rescale), lora.attached(world.model, world.state.tensors, 4.0):
        expected = logits(world.model)
    assert torch.equal(world.logits(Budget("small", 1)), expected)
    plain = World(tiny_model_folder, tiny_data, method={"name": "flame", "rescale": "none"})
    trained = plain.play(1, *plain.clients)[0].content.tensors["layers.0.self_attn.q_proj.lora_B"]
    assert not torch.equal(trained, uploads[0].content.tensors["layers.0.self_attn.q_proj.lora_B"])


def test_a_learnable_rescaler_may_begin_with_native_over_k(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flame", "rescaler_start": "static"})
    assert world.state.tensors["rescaler.top_k_1"].tolist() == [2.0, 2.0]
    assert world.state.tensors["rescaler.top_k_4"].tolist() == [0.5, 0.5]
    files = world.method.export(world.state, world.model)
    beside = Bundle.from_bytes(files["rescalers.safetensors"])
    assert beside.tensors["rescaler.top_k_1"].tolist() == [2.0, 2.0]
    assert beside.meta == {"sparse_layers": [0, 1]}


def test_a_gate_that_renormalises_leaves_nothing_to_rescale(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    world = World(tiny_model_folder, tiny_data, method={"name": "flame", "gate": "renormalised"})
    assert world.state.meta["rescale"] == "none"
    assert not any("rescaler" in name for name in world.state.tensors)


# What is refused ---------------------------------------------------------------------------------------------------


NO_RANKS = [{"name": "small", "share": 0.5, "top_k": 1}, {"name": "large", "share": 0.5, "top_k": 2, "rank": 4}]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"method": {"name": "flexlora"}, "clients": {"tiers": NO_RANKS}}, r"flexlora needs a LoRA .*'small' has none"),
        ({"method": {"name": "flora"}, "clients": {"tiers": NO_RANKS}}, r"flora needs a LoRA rank .*'small' has none"),
        ({"method": {"name": "hetlora"}, "clients": {"tiers": NO_RANKS}}, r"hetlora needs a LoRA .*'small' has none"),
        ({"method": {"name": "homolora"}, "clients": {"tiers": NO_RANKS}}, r"rank: adapter would take adapter.rank"),
        ({"adapter": {"rank": 17}}, r"adapter.rank 17 is above the size of 'layers.0.*16.*lower it"),
        ({"method": {"name": "flexlora", "rank": 99}}, r"method.rank 99 is above the size of"),
        ({"method": {"name": "flexlora", "rank": 3}}, r"method.rank 3 is below the largest tier's rank 4"),
        ({"method": {"name": "flora"}, "model": {"expert_bits": 4}}, r"flora merges .* quantised base cannot"),
        ({"method": {"name": "homolora", "temperature": 1.0}}, r"temperature has no effect with weighting 'data'"),
        ({"method": {"name": "hetlora", "frequency": "per_token"}}, r"frequency has no effect with weighting 'norm'"),
        ({"method": {"name": "flame", "gate": "renormalised", "rescale": "mass"}}, r"'mass' has nothing to repair"),
        ({"method": {"name": "flame", "rescale": "none", "rescaler_start": "static"}}, r"rescaler_start has no effect"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value)[:60],
)  # fmt: skip
def test_what_cannot_be_is_said_in_one_line(
    sections: dict[str, Any], words: str, tiny_model_folder: Path, tiny_data: Path
) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        World(tiny_model_folder, tiny_data, **sections)
    assert "\n" not in str(raised.value)


def test_a_rescaler_on_a_model_that_renormalises(tmp_path: Path, tiny_data: Path) -> None:
    from builders import save_tiny_family

    model = save_tiny_family("mixtral", tmp_path)
    with pytest.raises(
        ConfigError, match=r"rescale learnable has nothing to repair on this mixtral model.*rescale=none"
    ):
        World(model, tiny_data, method={"name": "flame", "rescale": "learnable"})
    assert World(model, tiny_data, method={"name": "flame"}).state.meta["rescale"] == "none"


def test_a_dense_model_has_no_activations_to_weigh_by(tmp_path: Path, tiny_data: Path) -> None:
    from builders import save_tiny_family

    model = save_tiny_family("llama", tmp_path)
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, "rank": 2}]
    with pytest.raises(ConfigError, match=r"method.weighting activation needs a model with experts"):
        World(model, tiny_data, method={"name": "flexlora", "weighting": "activation"}, clients={"tiers": tiers})


def test_clients_of_a_cohort_are_those_the_server_knows(tiny_model_folder: Path, tiny_data: Path) -> None:
    """HetLoRA and FLoRA keep marks by client id: an unknown client is simply a new one."""
    for method in ("hetlora", "flora"):
        world = World(tiny_model_folder, tiny_data, method={"name": method})
        world.play(1, "c0", "c1")
        stranger = Client("late", Budget("small", 1, 2), 5)
        download = world.method.dispatch(world.state, stranger, 2)
        assert download.content.tensors
