"""What server and clients must share: every difference is named, and what may differ is not; descriptions and rolls."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import tiny_model, tiny_tokenizer
from federations import Vision, config
from hypothesis import given
from hypothesis import strategies as st

import emberfed
from emberfed import assembly, deployment
from emberfed.checkpoint import RunFolder
from emberfed.config import RunConfig, parse
from emberfed.deployment import Enrolled, Home, Roll
from emberfed.errors import RunFolderError
from emberfed.handshake import described, differences, shared_settings
from emberfed.records import Json

Values = dict[str, Any]

SHARED: Mapping[str, Callable[[Values], object]] = {
    "seed": lambda values: values.update(seed=4),
    "method.name": lambda values: values["method"].update(name="homolora"),
    "adapter.rank": lambda values: values["adapter"].update(rank=3),
    "adapter.alpha": lambda values: values["adapter"].update(alpha=5),
    "training.learning_rate": lambda values: values["training"].update(learning_rate=2e-2),
    "training.batch_size": lambda values: values["training"].update(batch_size=3),
    "training.max_steps": lambda values: values["training"].update(max_steps=7),
    "data.template": lambda values: values["data"].update(template="chat"),
    "data.max_length": lambda values: values["data"].update(max_length=32),
    "data.client_test_share": lambda values: values["data"].update(client_test_share=0.25),
    "evaluation.max_new_tokens": lambda values: values["evaluation"].update(max_new_tokens=5),
    "model.dtype": lambda values: values["model"].update(dtype="bfloat16"),
    "tier small": lambda values: values["clients"]["tiers"][0].update(top_k=2),
    "tier middle": lambda values: values["clients"]["tiers"][1].update(rank=2),
}
"""Settings changed on one side, by the key that must be named."""

FREE: Mapping[str, Callable[[Values], object]] = {
    "model.path": lambda values: values["model"].update(path="/elsewhere"),
    "model.revision": lambda values: values["model"].update(revision="main"),
    "model.tokenizer": lambda values: values["model"].update(tokenizer="/elsewhere"),
    "model.expert_storage": lambda values: values["model"].update(expert_storage="disk"),
    "model.device": lambda values: values["model"].update(device="cpu"),
    "model.threads": lambda values: values["model"].update(threads=7),
    "data.path": lambda values: values["data"].update(path="/elsewhere"),
    "data.limit": lambda values: values["data"].update(limit=40),
    "data.test_size": lambda values: values["data"].update(test_size=5),
    "data.partition": lambda values: values["data"].update(partition={"kind": "iid"}),
    "evaluation.every": lambda values: values["evaluation"].update(every=0),
    "evaluation.tiers": lambda values: values["evaluation"].update(tiers=["small"]),
    "training.rounds": lambda values: values["training"].update(rounds=9),
    "engine": lambda values: values.update(engine={"name": "flower"}),
    "output.name": lambda values: values.update(output={"name": "mine"}),
    "clients.count": lambda values: values["clients"].update(count=8),
    "clients.min_replies": lambda values: values["clients"].update(min_replies=2),
    "a tier's share": lambda values: [
        tier.update(share=share) for tier, share in zip(values["clients"]["tiers"], (0.25, 0.5, 0.25), strict=True)
    ],
}
"""Settings that each side has as it likes."""


def values() -> Values:
    return json.loads(json.dumps(config(Path("/model"), Path("/data"))))  # type: ignore[no-any-return]


def changed(change: Callable[[Values], object]) -> RunConfig:
    other = values()
    change(other)
    return parse(other)


def keys(found: list[str]) -> list[str]:
    return [one.partition(": ")[0] for one in found]


# ------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("key", SHARED)
def test_a_shared_setting_that_differs_is_named_with_both_values(key: str) -> None:
    here, there = shared_settings(parse(values())), shared_settings(changed(SHARED[key]))
    (found,) = [one for one in differences(here, there) if one.startswith(f"{key}: ")]
    for side in (here, there):
        assert ("none" if side[key] is None else json.dumps(side[key])[:75]) in found
    if key != "method.name":  # another method has other settings, which are named too
        assert keys(differences(here, there)) == [key]


@pytest.mark.parametrize("key", FREE)
def test_a_setting_of_each_side_s_own_is_not_compared(key: str) -> None:
    here, there = parse(values()), changed(FREE[key])
    assert here.values() != there.values()
    assert differences(shared_settings(here), shared_settings(there)) == []


def test_every_setting_is_shared_or_free() -> None:
    """Of the sections that describe training no key is overlooked: what is left out is known, and tried above."""
    checked = parse(values())
    sections = ("model", "method", "adapter", "training", "data", "evaluation")
    all_keys = {f"{section}.{key}" for section in sections for key in checked.values()[section]}
    left_out = all_keys - set(shared_settings(checked))
    not_tried = {"data.split", "data.format", "adapter.start_from"}
    assert left_out - set(FREE) <= not_tried
    assert {key for key in FREE if key in all_keys} <= left_out


def test_a_tier_of_one_side_alone_is_named() -> None:
    def renamed(other: Values) -> None:
        other["clients"]["tiers"][0]["name"] = "tiny"

    found = differences(shared_settings(parse(values())), shared_settings(changed(renamed)))
    assert keys(found) == ["tier small", "tier tiny"]
    assert found[0].endswith("the client none")
    assert "the server has none" in found[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.text("ab", max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text("xy", max_size=2), inner, max_size=2),
    max_leaves=4,
)
TOLD = st.dictionaries(st.sampled_from(["seed", "model sha256", "classes", "emberfed", "tier a"]), JSON)


@given(TOLD, TOLD)
def test_differences_are_those_of_the_two_sides_and_nothing_else(
    server: dict[str, Json], client: dict[str, Json]
) -> None:
    """Nothing where both agree, also over the wire; as many phrases in either direction; a slow oracle of the keys."""
    assert differences(server, json.loads(json.dumps(server))) == []
    there = differences(server, client)
    assert len(there) == len(differences(client, server))
    oracle = [key for key in sorted(server.keys() | client.keys()) if server.get(key) != client.get(key)]
    assert keys(there) == oracle


def test_long_values_are_cut() -> None:
    (found,) = differences({"classes": ["x" * 5000]}, {"classes": []})
    assert len(found) < 200


# ------------------------------------------------------------------------------------------ model, tokenizer, adapter


def told(
    checked: RunConfig, model: Any = None, processor: Any = None, classes: tuple[str, ...] = ()
) -> dict[str, Json]:
    """What one side says of itself; by default that of the tiny OLMoE with its tokenizer."""
    given = tiny_model() if model is None else model
    return described(checked, given, processor or tiny_tokenizer(), classes, assembly.method(checked))


def test_the_same_parts_agree_wherever_they_are() -> None:
    assert differences(told(parse(values())), told(changed(FREE["model.path"]))) == []


def test_one_number_of_the_model_is_enough() -> None:
    other = tiny_model()
    with torch.no_grad():
        next(iter(other.lm.parameters())).view(-1)[0] += 1e-3
    found = differences(told(parse(values())), told(parse(values()), other))
    assert keys(found) == ["model sha256"]


def test_another_model_is_named_by_what_it_is() -> None:
    found = keys(differences(told(parse(values())), told(parse(values()), tiny_model(num_experts=4))))
    assert {"model num_experts", "model parameters", "model sha256", "adapter"} <= set(found)


def test_tokenizer_and_chat_template_are_compared() -> None:
    here = told(parse(values()))
    padded = tiny_tokenizer()
    padded.add_special_tokens({"sep_token": "w3"})
    chatty = tiny_tokenizer()
    chatty.chat_template = "{{ messages }}"
    longer = tiny_tokenizer()
    longer.add_tokens(["w64"])
    for other in (padded, chatty, longer):
        assert keys(differences(here, told(parse(values()), processor=other))) == ["tokenizer or preprocessing"]


def test_image_processing_is_compared(tmp_path: Path) -> None:
    vision = Vision.made(tmp_path)
    checked = parse(vision.config(method={"name": "linear_probe"}))
    home = deployment.home(checked)
    assert home.expected["classes"] == list(home.classes)
    other = Path(shutil.copytree(vision.model, tmp_path / "other"))
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.25] * 3,
    }
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    there = deployment.home(parse(Vision(other, vision.data).config(method={"name": "linear_probe"})))
    assert keys(differences(home.expected, there.expected)) == ["tokenizer or preprocessing"]


def test_classes_are_compared_in_their_order() -> None:
    checked = parse(values())
    here, there = told(checked, classes=("cat", "dog")), told(checked, classes=("dog", "cat"))
    assert differences(here, there) == ['classes: the server has ["cat", "dog"], the client ["dog", "cat"]']


def test_the_adapter_s_layout_is_compared_but_not_with_a_file_s() -> None:
    """The rank in the settings and the tensors that come of it are named; a layout that only one side knows is not."""
    here, there = told(parse(values())), told(changed(SHARED["adapter.rank"]))
    assert keys(differences(here, there)) == ["adapter", "settings adapter.rank"]
    without = {key: value for key, value in there.items() if key != "adapter"}
    assert keys(differences(here, without)) == ["settings adapter.rank"]


def test_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    here = told(parse(values()))
    monkeypatch.setattr(emberfed, "__version__", "99.0")
    there = told(parse(values()))
    assert differences(here, there) == [f'emberfed: the server has {json.dumps(here["emberfed"])}, the client "99.0"']


# ------------------------------------------------------------------------------------------ descriptions


@pytest.fixture(scope="module")
def home(tiny_model_folder: Path, tiny_data: Path) -> Home:
    return deployment.home(parse(config(tiny_model_folder, tiny_data)))


def description(home: Home, **other: Json) -> dict[str, Json]:
    """What an honest client tells, but for what is given."""
    counts = {**home.test.report.json(), "examples": 5, "kept_apart": 0}
    return {"own": dict(home.expected), "client": "anna", "tier": "small", "counts": counts, **other}


def test_an_honest_client_is_enrolled(home: Home) -> None:
    found = deployment.read_description(json.loads(json.dumps(description(home))), "anna", home)
    assert isinstance(found, Enrolled)
    assert (found.id, found.tier, found.counts["examples"]) == ("anna", "small", 5)


def counted(home: Home, **other: Json) -> dict[str, Json]:
    return {"counts": {**home.test.report.json(), "examples": 5, "kept_apart": 0, **other}}


LIES: Mapping[str, tuple[Callable[[Home], dict[str, Json]], str]] = {
    "own problem": (lambda home: {"problem": "no disk"}, "no disk"),
    "nothing": (lambda home: {"own": None}, "did not describe itself"),
    "tier is a number": (lambda home: {"tier": 3}, "did not describe itself"),
    "no counts": (lambda home: {"counts": []}, "did not describe itself"),
    "other version": (lambda home: {"own": {**home.expected, "emberfed": "0"}}, "emberfed: the server has"),
    "claims more": (lambda home: {"own": {**home.expected, "settings x": 1}}, "settings x: the server has none"),
    "another's name": (lambda home: {"client": "ben"}, "it says it is client 'ben'; its key is registered as 'anna'"),
    "unknown tier": (lambda home: {"tier": "smal"}, "its tier 'smal' is not known; did you mean 'small'?"),
    "negative": (lambda home: counted(home, examples=-1), "whole numbers from 0"),
    "a fraction": (lambda home: counted(home, examples=1.5), "whole numbers from 0"),
    "true": (lambda home: counted(home, examples=True), "whole numbers from 0"),
    "huge": (lambda home: counted(home, examples=10**400), "whole numbers from 0"),
    "none": (lambda home: counted(home, examples=0), "it has no examples"),
    "other counts": (lambda home: counted(home, tier=2), "of its data, not"),
    "too few counts": (lambda home: {"counts": {"examples": 3}}, "it counts examples of its data, not"),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_does_not_fit_is_refused_in_one_line(home: Home, lie: str) -> None:
    make, words = LIES[lie]
    found = deployment.read_description(description(home, **make(home)), "anna", home)
    assert isinstance(found, str)
    assert words in found
    assert "\n" not in found


@given(other=st.dictionaries(st.sampled_from(["own", "client", "tier", "counts", "problem"]), JSON, min_size=1))
def test_no_description_breaks_the_server(home: Home, other: dict[str, Json]) -> None:
    """Whatever JSON a client sends, it is enrolled or refused, and never anything else."""
    found = deployment.read_description(description(home, **other), "anna", home)
    assert isinstance(found, str | Enrolled)


def test_a_client_that_keeps_nothing_apart_is_refused_where_that_is_evaluated(home: Home) -> None:
    checked = replace(home.config, data=home.config.data.model_copy(update={"client_test_share": 0.2}))
    stricter = replace(home, config=checked)
    found = deployment.read_description(description(home), "anna", stricter)
    assert found == "it keeps no examples for evaluating its own model (data.client_test_share)"


# ------------------------------------------------------------------------------------------ the roll


NAMES = st.text("abcé0_-", min_size=1, max_size=6)
CLIENTS = st.builds(
    Enrolled,
    NAMES,
    st.sampled_from(["small", "large"]),
    st.fixed_dictionaries(
        {"examples": st.integers(1, 2**53)},
        optional={key: st.integers(0, 2**53) for key in ("kept_apart", "target_tokens")},
    ),
)


@given(clients=st.lists(CLIENTS, max_size=5, unique_by=lambda one: one.id))
def test_a_roll_reads_back_as_it_was_recorded(
    clients: list[Enrolled], tmp_path_factory: pytest.TempPathFactory, home: Home
) -> None:
    roll = Roll.of(clients, home.test)
    assert [one.id for one in roll.clients] == sorted(one.id for one in clients)
    folder = kept(tmp_path_factory.mktemp("run"), roll.record())
    assert Roll.read(folder) == roll
    assert deployment.is_one(folder)
    assert roll.totals() == {
        key: sum(one.counts.get(key, 0) for one in clients) for key in {key for one in clients for key in one.counts}
    }


def test_two_runs_have_two_identities(home: Home) -> None:
    rolls = [Roll.of([], home.test) for _ in range(20)]
    assert len({roll.run for roll in rolls}) == 20
    assert all(roll.run.isalnum() for roll in rolls)


def kept(path: Path, record: Json) -> RunFolder:
    """A run's folder with that partition.json."""
    for name, content in {"run.json": {}, "partition.json": record}.items():
        (path / name).write_text(json.dumps(content))
    (path / "config.yaml").write_text("{}\n")
    return RunFolder.open(path)


GOOD: dict[str, Json] = {
    "kind": "deployment",
    "run": "abc",
    "clients": {"anna": {"tier": "small", "examples": 3}},
    "sha256": {"test split": "0"},
}


@pytest.mark.parametrize(
    "damage",
    [
        {"run": None},
        {"run": 3},
        {"clients": None},
        {"clients": ["anna"]},
        {"clients": {"anna": None}},
        {"clients": {"anna": {}}},
        {"clients": {"anna": {"tier": 3, "examples": 3}}},
        {"clients": {"anna": {"tier": "small"}}},
        {"sha256": {}},
        {"sha256": None},
        {"sha256": {"test split": 1}},
    ],
)
def test_a_damaged_roll_is_named(tmp_path: Path, damage: dict[str, Json]) -> None:
    assert Roll.read(kept(tmp_path, GOOD)).clients[0].id == "anna"
    with pytest.raises(RunFolderError, match=r"partition\.json is damaged"):
        Roll.read(kept(tmp_path, {**GOOD, **damage}))


def test_a_client_on_a_tier_that_is_gone_is_named(home: Home) -> None:
    roll = Roll.of([Enrolled("anna", "giant", {"examples": 3})], home.test)
    with pytest.raises(RunFolderError, match="client 'anna' joined on tier 'giant'"):
        deployment.material(home, roll)


def test_a_run_on_one_machine_is_no_deployment(tmp_path: Path) -> None:
    folder = kept(tmp_path, {"kind": "iid", "rows": {}})
    assert not deployment.is_one(folder)
    with pytest.raises(RunFolderError, match="go on with: emberfed resume"):
        Roll.read(folder)
