"""FLUX from end to end: runs cut and resumed, who tunes what, what travels, and what clients' work is counted as."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import pytest
import torch
import yaml
from builders import tiny_model
from compact_worlds import CompactWorld, bundle_bits, model_bits, one_tier, places, played
from federations import bits, config
from test_kill import wait_until_written

from emberfed import assembly, compact_session
from emberfed.admission import Asked, payload_problem
from emberfed.checkpoint import RunFolder
from emberfed.clients import Budget, Client
from emberfed.config import parse
from emberfed.errors import ClientError, ConfigError, ModelError
from emberfed.federated_experts import ExpertTuningConfig
from emberfed.methods.flux import Flux, FluxConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.profiling import Profile, profile
from emberfed.records import Bundle, Payload
from emberfed.sections import validate
from emberfed.seeds import Seeds
from emberfed.training import Trainer, TrainingConfig
from emberfed.worker import MemoryFolder

ADAPTERS: Mapping[str, dict[str, Any]] = {
    "lora": {"tune": "lora", "rank": 2, "alpha": 4},
    "full": {"tune": "full", "rank": 8, "alpha": 16.0},
}
"""By what is tuned; a rank has no effect on what is tuned in full, and is the default then."""

WHOLE_RUNS = [
    ("flux", "lora", {}),
    ("flux", "full", {}),
    ("flux", "lora", {"profile": "fresh"}),
    ("flux", "full", {"profile": "fresh", "profile_bits": None, "coverage": 1}),
    ("fmes", "lora", {"dropped": "reroute"}),
    ("fmes", "full", {"dropped": "skip"}),
]


def values(model: Path, data: Path, method: str, tune: str, options: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    return config(
        model,
        data,
        method={"name": method, **options},
        adapter=ADAPTERS[tune],
        training={"rounds": rounds, "max_steps": 2},
        evaluation={"every": 0, "max_examples": 2},
    )


def settled(given: dict[str, Any], folder: RunFolder, materials: assembly.Materials, after: int) -> dict[str, bytes]:
    """What each client keeps after a round, once it has done its idle work."""
    checked = parse(given)
    material = materials.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    memory = MemoryFolder(folder.path / "memory")
    return {
        client.id: bundle_bits(
            method.idle(material.model, client, material.shards[client.id], memory.read(client.id, after + 1))
        )
        for client in material.clients
    }


@pytest.mark.parametrize(("method", "tune", "options"), WHOLE_RUNS)
def test_one_round_and_two_more_are_three(
    method: str, tune: str, options: Mapping[str, Any], tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Bit for bit: states (roles are in them), uploads, and what clients keep. The base is left as found."""
    materials = assembly.Materials()
    one, three = (values(tiny_model_folder, tiny_data, method, tune, options, rounds) for rounds in (1, 3))
    model = materials.gather(parse(three)).model
    before, stream = model_bits(model), torch.get_rng_state()
    whole = played(three, tmp_path / "whole", materials)
    played(one, tmp_path / "parts", materials)
    parts = played(three, tmp_path / "parts", materials)
    assert model_bits(model) == before
    assert torch.equal(torch.get_rng_state(), stream)
    assert bits(parts.path) == bits(whole.path)
    assert [line["replied"] for line in parts.metrics() if line["event"] == "round"] == [["c0", "c1", "c2", "c3"]] * 3
    for after in (1, 2, 3):
        kept = settled(three, whole, materials, after)
        assert kept == settled(three, parts, materials, after)
        assert len(set(kept.values())) == (4 if method == "flux" else 1)
    losses = {(line["round"], line["tier"]): line["loss"] for line in whole.metrics() if line["event"] == "evaluation"}
    assert losses[3, "large"] != losses[0, "large"]


def test_killed_while_clients_are_idle_and_resumed(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    """SIGKILL once all uploads of round 2 are there, when clients make profiles or are about to."""
    given = values(tiny_model_folder, tiny_data, "flux", "lora", {}, 3)
    materials = assembly.Materials()
    whole = played(given, tmp_path / "whole", materials)
    file, run = tmp_path / "config.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(given))
    command = [sys.executable, "-m", "emberfed", "run", str(file), "--output", str(run)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    two_states, eight_uploads, two_adapters = 2, 8, 2
    wait_until_written(run, process, two_states + eight_uploads + two_adapters)
    time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert bits(played(given, run, materials).path) == bits(whole.path)
    assert settled(given, RunFolder.open(run), materials, 3) == settled(given, whole, materials, 3)


# ------------------------------------------------------------------------------------------ what travels


def test_only_exploited_experts_travel_up_and_bytes_fall_with_the_budget(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Beside them a fixed number of counts: the tensors of n experts of rank 2 have 3 * 2 * (32 + 16) numbers each."""
    sizes = {}
    for tuned in (1, 2, 4, 8):
        world = CompactWorld(
            tiny_model_folder,
            tiny_data,
            method={"name": "flux", "epsilon_first": 1.0},
            clients=one_tier(tuned_experts=tuned, held_experts=12),
            training={"max_steps": 1},
        )
        [upload] = world.play(1, "c0")
        exploited = places(upload.content.meta["exploited"])
        assert len(exploited) == tuned
        stacks = {name: tensor for name, tensor in upload.content.tensors.items() if name.startswith("layers.")}
        assert sum(tensor.numel() for tensor in stacks.values()) == tuned * 3 * 2 * (32 + 16)
        for name, tensor in stacks.items():
            row = world.state.meta["sparse_layers"].index(int(name.split(".")[1]))
            assert len(tensor) == sum(place[0] == row for place in exploited)
        sizes[tuned] = len(upload.to_bytes())
    assert sorted(sizes.values()) == list(sizes.values())
    assert sizes[8] > 2 * sizes[1]


def test_an_upload_of_other_experts_than_the_client_was_told_is_refused(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Whether it only says so, or sends them."""
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"}, training={"max_steps": 1})
    world.assign(1)
    download, upload = world.download("c0", 1), world.fit("c0", 1)
    meta = download.content.meta
    told = Asked(1, "c0", world.method.expects(world.state, download), meta["top_k"], exploited=meta["exploited"])
    assert payload_problem(upload, told) is None
    other = [[(expert + 1) % 8 for expert in ids] for ids in meta["exploited"]]
    lie = Payload(1, "c0", Bundle(upload.content.tensors, {**upload.content.meta, "exploited": other}))
    assert payload_problem(lie, told) == f"'exploited' is {other}, the client was given {meta['exploited']}"
    name = next(name for name in upload.content.tensors if name.startswith("layers."))
    more = {**upload.content.tensors, name: torch.cat([upload.content.tensors[name]] * 2)}
    problem = payload_problem(Payload(1, "c0", Bundle(more, upload.content.meta)), told)
    assert problem is not None
    assert problem.startswith(f"tensor {name!r}: shape")


# ------------------------------------------------------------------------------------------ who tunes what


def method(**options: Any) -> Flux:
    return Flux(FluxConfig(**options), ExpertTuningConfig(rank=2), Trainer(TrainingConfig()))


def clients(count: int, tuned: int) -> list[Client]:
    return [Client(f"c{number}", Budget("all", 2, tuned_experts=tuned, held_experts=8), 10) for number in range(count)]


def state(flux: Flux, reach: Mapping[str, list[list[int]]]) -> Bundle:
    """The first state of a model of one layer of four experts, with surveys of clients to come."""
    model = tiny_model(num_hidden_layers=1, num_experts=4)
    budgets = [client.budget for client in clients(1, 2)]
    budgets = [Budget("all", 2, tuned_experts=1, held_experts=4)]
    begun = flux.init(model, budgets, Seeds(5))
    surveys = [Payload(1, id_, Bundle({"reach": torch.tensor(reach_LE)})) for id_, reach_LE in reach.items()]
    return flux.assign(begun, [], surveys, 1)


def roles(given: Bundle) -> dict[str, tuple[set[tuple[int, int]], set[tuple[int, int]]]]:
    return {id_: (places(told["exploited"]), places(told["explored"])) for id_, told in given.meta["roles"].items()}


def with_figures(given: Bundle, **rms: list[list[float]]) -> Bundle:
    figures = {f"client.{id_}.gradient_rms": torch.tensor(rms_LE) for id_, rms_LE in rms.items()}
    return Bundle({**given.tensors, **figures}, given.meta)


def test_experts_are_exploited_by_reach_times_gradient() -> None:
    """|D^e| is 4, 3, 2, 1 and gradients are 1, 2, unknown, 9. The known ones' mean, 4, stands for the unknown.

    Utilities are 4, 6, 8, 9: two slots go to experts 2 and 3. When no gradient is known, to the two of most examples.
    """
    flux = method(epsilon_first=1.0, epsilon_last=1.0)
    begun = state(flux, {"c0": [[4, 3, 2, 1]]})
    cohort = clients(1, 2)
    assert roles(flux.assign(begun, cohort, [], 1))["c0"] == ({(0, 0), (0, 1)}, set())
    known = with_figures(begun, c0=[[1.0, 2.0, -1.0, 9.0]])
    assert roles(flux.assign(known, cohort, [], 2))["c0"] == ({(0, 2), (0, 3)}, set())


def test_experts_that_no_example_reaches_are_neither_exploited_nor_explored() -> None:
    flux = method(epsilon_first=0.5)
    begun = state(flux, {"c0": [[5, 0, 1, 0]]})
    for round in range(1, 6):
        exploited, explored = roles(flux.assign(begun, clients(1, 4), [], round))["c0"]
        assert exploited | explored == {(0, 0), (0, 2)}


def test_the_exploited_share_grows_from_round_to_round_and_the_rest_explores() -> None:
    """Of 4 slots: 0.25, 0.625 (2.5 is rounded up), then all; the draw of the others is another one in each round."""
    flux = method(epsilon_first=0.25, epsilon_last=1.0, epsilon_rounds=3)
    begun = state(flux, {"c0": [[4, 3, 2, 1]]})
    found = [roles(flux.assign(begun, clients(1, 4), [], round))["c0"] for round in range(1, 6)]
    assert [(len(exploited), len(explored)) for exploited, explored in found] == [
        (1, 3),
        (3, 1),
        (4, 0),
        (4, 0),
        (4, 0),
    ]
    few = method(epsilon_first=0.5, epsilon_last=0.5)
    drawn = {frozenset(roles(few.assign(begun, clients(1, 2), [], round))["c0"][1]) for round in range(1, 30)}
    assert drawn == {frozenset({(0, 1)}), frozenset({(0, 2)}), frozenset({(0, 3)})}
    assert roles(few.assign(begun, clients(1, 2), [], 7)) == roles(few.assign(begun, clients(1, 2), [], 7))


def test_with_coverage_clients_of_one_taste_share_out_the_experts() -> None:
    """Four clients that all like expert 0 best, with one slot each: without coverage all train it, with it one each."""
    reach = {f"c{number}": [[4, 3, 2, 1]] for number in range(4)}
    for coverage, expected in ((0, {(0, 0)}), (1, {(0, 0), (0, 1), (0, 2), (0, 3)})):
        flux = method(epsilon_first=1.0, coverage=coverage)
        found = roles(flux.assign(state(flux, reach), clients(4, 1), [], 1))
        assert set().union(*(exploited for exploited, _ in found.values())) == expected
        assert all(len(exploited) == 1 for exploited, _ in found.values())


def test_a_client_that_nothing_is_known_of_may_tune_anything() -> None:
    """One that is dispatched to by itself, as for its own model: its roles are those it would have without others."""
    flux = method(epsilon_first=0.5, coverage=1)
    begun = state(flux, {"c0": [[4, 3, 2, 1]]})
    late = Client("late", Budget("all", 2, tuned_experts=4, held_experts=8), 3)
    told = flux.dispatch(begun, late, 1).content.meta
    assert places(told["exploited"]) == {(0, 0), (0, 1)}, "of equal ones the first"
    assert places(told["explored"]) == {(0, 2), (0, 3)}
    alone = method(epsilon_first=0.5, coverage=0).assign(begun, clients(1, 2), [], 1)
    assert flux.dispatch(begun, clients(1, 2)[0], 1).content.meta["exploited"] == alone.meta["roles"]["c0"]["exploited"]


def test_figures_stay_known_until_there_are_newer_ones(tiny_model_folder: Path, tiny_data: Path) -> None:
    """A client's tuned and explored experts have a figure; others keep theirs, of this client alone."""
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"}, training={"max_steps": 1})
    names = [f"client.{id_}.gradient_rms" for id_ in world.clients]
    world.assign(1)
    assert all(bool((world.state.tensors[name] == -1).all()) for name in names)
    first, *_ = world.play(1)
    found_LE = first.content.tensors["gradient_rms"]
    meta = first.content.meta
    assert {(row, expert) for row, expert in (found_LE >= 0).nonzero().tolist()} >= places(meta["exploited"])
    marked = {**world.state.tensors, names[0]: torch.where(found_LE < 0, 7.0, found_LE)}
    world.state = Bundle(marked, world.state.meta)
    second = next(upload for upload in world.play(2) if upload.client == "c0")
    newer_LE, kept_LE = second.content.tensors["gradient_rms"], world.state.tensors[names[0]]
    assert bool((newer_LE < 0).any())
    assert bool((newer_LE >= 0).any())
    assert torch.equal(kept_LE, torch.where(newer_LE >= 0, newer_LE, marked[names[0]]))
    reach = second.content.tensors["reach"]
    assert torch.equal(world.state.tensors["client.c0.reach"], reach)


# ------------------------------------------------------------------------------------------ a client's round


def test_profiles_are_of_the_base_then_of_the_model_of_the_last_round(tiny_model_folder: Path, tiny_data: Path) -> None:
    """In 8 bits: the survey's profile is that of the base's copy, and idle work's of what the client was sent."""
    options = {"name": "flux", "profile_bits": 8, "epsilon_first": 1.0}
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method=options,
        adapter=ADAPTERS["full"],
        training={"max_steps": 3, "learning_rate": 0.3},
    )
    world.assign(1)
    surveyed = Profile.from_tensors(world.memories["c0"].tensors)
    base = by_hand(world, "c0", world.model)
    apart = float((surveyed.counts_LE - base.counts_LE).abs().sum())
    assert apart < 0.05 * float(base.counts_LE.sum()), "8 bits are close to the base"
    world.play(1)
    assert torch.equal(Profile.from_tensors(world.memories["c0"].tensors).counts_LE, surveyed.counts_LE), (
        "sent the base"
    )
    world.play(2)
    with world.method.deploy(world.state, world.model, world.clients["c0"].budget):
        now = by_hand(world, "c0", world.model)
    kept = Profile.from_tensors(world.memories["c0"].tensors)
    assert not torch.equal(kept.counts_LE, surveyed.counts_LE), "sent what round 1 made"
    assert now.tokens == kept.tokens


def by_hand(world: CompactWorld, id_: str, model: FoundationModel) -> Profile:
    batch: Any = world.shard(id_).collate(world.shard(id_).examples)
    with model.active_experts(world.clients[id_].budget.top_k):
        return profile(model, [(batch.input_ids, batch.attention_mask)])


def test_a_fresh_profile_is_of_the_model_that_is_trained(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Made with the model itself: its counts are those that the whole model routes by."""
    options = {"name": "flux", "profile": "fresh", "profile_bits": None, "epsilon_first": 1.0}
    training = {"max_steps": 3, "learning_rate": 0.3}
    world = CompactWorld(tiny_model_folder, tiny_data, method=options, adapter=ADAPTERS["full"], training=training)
    world.play(1)
    with world.method.deploy(world.state, world.model, world.clients["c0"].budget):
        sent = by_hand(world, "c0", world.model)
    world.play(2)
    kept = Profile.from_tensors(world.memories["c0"].tensors)
    assert torch.equal(kept.counts_LE, sent.counts_LE)
    assert torch.equal(kept.reached_NLE, sent.reached_NLE)


def test_work_of_profiles_is_counted_where_it_is_done(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Stale: the survey's profile before round 1, then one in idle time of each round. Fresh: the survey's and one
    before training in round 1, one in each later round, none in idle time. Training is the same work in both."""
    work: dict[str, list[dict[str, int]]] = {}
    for kind in ("stale", "fresh"):
        options = {"name": "flux", "profile": kind, "epsilon_first": 1.0, "epsilon_last": 1.0}
        training = {"max_steps": 1, "batch_size": 64, "learning_rate": 1e-30}
        world = CompactWorld(tiny_model_folder, tiny_data, method=options, training=training)
        uploads = [world.play(round, "c0")[0] for round in (1, 2, 3)]
        work[kind] = [upload.content.meta["stats"] for upload in uploads]
    one = work["stale"][0]["idle_flops"]
    assert one > 0
    assert [stats["idle_flops"] for stats in work["stale"]] == [one] * 3
    assert not any("idle_flops" in stats for stats in work["fresh"])
    plain = [stats["flops"] for stats in work["stale"]]
    survey = plain[0] - plain[1]
    assert plain[1] == plain[2]
    comparing = compact_session.comparing_flops(world.model)
    assert 0 < survey - comparing <= one, "on the base alone, without a LoRA"
    assert [stats["flops"] for stats in work["fresh"]] == [plain[1] + survey + one, plain[1] + one, plain[1] + one]
    traffic = work["stale"][0]["idle_memory_traffic_bytes"]
    totals = {kind: [stats["memory_traffic_bytes"] for stats in stats_] for kind, stats_ in work.items()}
    assert totals["stale"] == [totals["stale"][1] + traffic, totals["stale"][1], totals["stale"][1]]
    assert totals["fresh"] == [totals["stale"][1] + 2 * traffic, *[totals["stale"][1] + traffic] * 2]


def test_examples_that_reach_no_exploited_expert_are_left_out(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux", "epsilon_first": 1.0},
        clients=one_tier(tuned_experts=1, held_experts=6, top_k=1),
    )
    world.assign(1)
    reached_NLE = world.memories["c0"].tensors["reached"].clone()
    counts = reached_NLE.sum(0)
    row, expert = min(((r, e) for r in range(2) for e in range(8) if counts[r, e] > 0), key=lambda p: int(counts[p]))
    assert int(counts[row, expert]) < len(reached_NLE)
    exploited = [[expert] if r == row else [] for r in range(2)]
    told = {"c0": {"exploited": exploited, "explored": [[], []]}}
    world.state = Bundle(world.state.tensors, {**world.state.meta, "roles": told})
    upload = world.fit("c0", 1)
    assert upload.content.meta["examples"] == int(counts[row, expert])


def test_an_expert_that_no_example_reaches_any_more_keeps_its_bits_and_its_figure(
    tiny_model_folder: Path, tiny_data: Path
) -> None:
    """As when a profile is staler than the roles: the client trains on all its examples, and nothing moves."""
    world = CompactWorld(
        tiny_model_folder,
        tiny_data,
        method={"name": "flux", "epsilon_first": 1.0},
        clients=one_tier(tuned_experts=2, held_experts=16, top_k=1),
    )
    world.assign(1)
    reached_LE = world.memories["c0"].tensors["reached"].any(0)
    row, expert = next((r, e) for r in range(2) for e in range(8) if not reached_LE[r, e])
    told = {"exploited": [[expert] if r == row else [] for r in range(2)], "explored": [[], []]}
    others = [place for place in (~reached_LE).nonzero().tolist() if place != [row, expert]]
    told["explored"] = [[expert for r, expert in others[:1] if r == of] for of in range(2)]
    world.state = Bundle(world.state.tensors, {**world.state.meta, "roles": {"c0": told}})
    upload = world.fit("c0", 1)
    assert upload.content.meta["examples"] == len(world.shard("c0").examples)
    layer = world.state.meta["sparse_layers"][row]
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        for side in ("lora_A", "lora_B"):
            name = f"layers.{layer}.experts.{matrix}.{side}"
            assert torch.equal(upload.content.tensors[name][0], world.state.tensors[name][expert])
    assert bool((upload.content.tensors["gradient_rms"] == -1).all())


# ------------------------------------------------------------------------------------------ attention that is not given


def test_a_model_without_attention_weights_is_told_what_to_set() -> None:
    """When the run begins: its attention computes by itself, past transformers' registry. Another weight will do."""
    model = tiny_model()
    for layer in model.layers:
        module: Any = layer
        module.self_attn.forward = _Alone(module.self_attn)
    budgets = [Budget("all", 2, tuned_experts=1, held_experts=4)]
    with pytest.raises(ModelError, match=r"no attention weights .* set method.merge_weights=frequency") as caught:
        method().init(model, budgets, Seeds(5))
    assert "\n" not in str(caught.value)
    assert method(merge_weights="frequency").init(model, budgets, Seeds(5)).tensors


@final
class _Alone:
    """An attention layer's forward pass that keeps to eager attention, whatever the model is set to."""

    def __init__(self, module: Any) -> None:
        self._forward, self._config = module.forward, module.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self._config._attn_implementation
        self._config._attn_implementation = "eager"
        try:
            return self._forward(*args, **kwargs)
        finally:
            self._config._attn_implementation = chosen


def test_merging_rules_give_other_models(tiny_model_folder: Path, tiny_data: Path) -> None:
    """Each option reaches what the client holds: its own model differs, in a federation that is the same otherwise."""
    rules: list[dict[str, Any]] = [
        {},
        {"layer_budget": "one"},
        {"merge_weights": "uniform"},
        {"dimensions": 1},
        {"merging": "least_error"},
    ]
    found = []
    for rule in rules:
        world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux", **rule})
        world.assign(1)
        found.append(world.personal("c0", 1))
    assert not any(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("key", ["layer_budget", "dimensions"])
def test_options_of_clusters_without_effect_are_refused(key: str) -> None:
    other = {"layer_budget": "one", "dimensions": 2}[key]
    with pytest.raises(ValueError, match=rf"{key} has no effect with merging 'least_error'; leave it out"):
        FluxConfig.model_validate({"merging": "least_error", key: other})


def test_a_repeated_survey_costs_the_same(tiny_model_folder: Path, tiny_data: Path) -> None:
    """After a resume a client's profile is there already; what it told the clock must not depend on that."""
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"}, model={"expert_storage": "disk"})
    client, shard = world.clients["c0"], world.shard("c0")
    first = world.method.survey(world.model, client, shard, Bundle(), Seeds(0))
    again = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"}, model={"expert_storage": "disk"})
    repeated = again.method.survey(again.model, client, shard, first.memory, Seeds(0))
    assert first.memory.meta["cost"]["disk_bytes"] > 0
    assert repeated.memory.meta == first.memory.meta


def test_what_least_error_does_not_look_at_cannot_be_set() -> None:
    with pytest.raises(ConfigError, match="layer_budget has no effect with merging 'least_error'"):
        validate(FluxConfig, {"merging": "least_error", "layer_budget": "uniform"}, "method")


def test_a_memory_without_its_model_is_told(tiny_model_folder: Path, tiny_data: Path) -> None:
    world = CompactWorld(tiny_model_folder, tiny_data, method={"name": "flux"})
    with pytest.raises(ClientError, match="what c0 keeps of its last round is damaged"):
        world.method.idle(world.model, world.clients["c0"], world.shard("c0"), Bundle({"foreign": torch.zeros(1)}))
