"""The configuration as a whole: names find classes, errors name keys, the resolved form repeats the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from federations import config

from emberfed import assembly
from emberfed.config import load, parse, quickstart_path
from emberfed.errors import ConfigError, DataError, EmberfedError, ModelError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", [quickstart_path(), *CONFIGS], ids=lambda path: path.stem)
def test_shipped_configurations_are_valid_and_their_resolved_form_says_the_same(path: Path) -> None:
    checked = load(path)
    again = parse(yaml.safe_load(checked.yaml()))
    assert again == checked
    assert again.values() == checked.values()
    assert sum(tier.share for tier in checked.clients.tiers) == pytest.approx(1)


def test_the_papers_set_up() -> None:
    """A3SMoE's section on experiments, as methods notes record it."""
    paper = load(Path(__file__).parents[1] / "configs" / "olmoe-dolly.yaml").values()
    assert paper["model"]["path"] == "allenai/OLMoE-1B-7B-0924"
    assert paper["data"]["path"] == "databricks/databricks-dolly-15k"
    assert paper["data"]["partition"]["alpha"] == 0.5
    assert [tier["top_k"] for tier in paper["clients"]["tiers"]] == [1, 2, 4, 8]
    assert paper["clients"]["count"] == 8
    assert (paper["adapter"]["rank"], paper["adapter"]["alpha"]) == (20, 16)
    training = paper["training"]
    assert (training["rounds"], training["local_epochs"], training["batch_size"]) == (2, 1, 16)
    assert (training["learning_rate"], training["optimizer"]) == (1.5e-4, "adam")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"trainin": {}}, "unknown key 'trainin'; did you mean 'training'?"),
    ({"training": {"learning_rat": 1}}, "unknown key 'training.learning_rat'; did you mean 'learning_rate'?"),
    ({"training": {"rounds": "many"}}, "'training.rounds': input should be a valid integer"),
    ({"method": {"name": "a3smo"}}, "unknown method 'a3smo'; did you mean 'a3smoe'?"),
    ({"method": {"name": "a3smoe", "temprature": 1}}, "unknown key 'method.temprature'; did you mean 'temperature'?"),
    ({"method": {"name": "a3smoe", "temperature": -1}}, "'method.temperature'"),
    ({"method": {"name": 3}}, "'method.name' is missing or not a word"),
    (
        {"engine": {"name": "remote"}},
        "unknown engine 'remote' (there are 'flaky', 'flower', 'flower-simulation', 'local', 'pool')",
    ),
    ({"engine": {"name": "flaky", "faults": {"c1": "explode"}}}, "'engine.faults.c1'"),
    ({"adapter": {"rank": 0}}, "'adapter.rank'"),
    ({"data": {"partition": {"kind": "dirichlet"}}}, "'data.partition.dirichlet.alpha' is missing"),
    (
        {"data": {"partition": {"kind": "dirichlett", "alpha": 1}}},
        "'data.partition.kind': unknown 'dirichlett'; did you",
    ),
    ({"data": {"partition": {"alpha": 1}}}, "'data.partition.kind' is missing"),
    ({"data": {"partition": {"kind": "iid", "alpha": 1}}}, "unknown key"),
    ({"data": {"task": "generating"}}, "'data.task': unknown 'generating'; did you mean 'generation'?"),
    ({"data": {"task": 3}}, "'data.task': unknown 3"),
    ({"data": {"client_test_share": 0.6}}, "'data.client_test_share'"),
    ({"method": {"name": "linear_probe"}, "adapter": {"rank": 2}}, "unknown key 'adapter.rank'"),
    ({"method": {"name": "fft_moe"}, "adapter": {"num_expert": 2}}, "'adapter.num_expert'; did you mean 'num_experts'"),
    ({"method": {"name": "fft_moe"}, "adapter": {"num_experts": 0}}, "'adapter.num_experts'"),
    ({"clients": {"count": 0}}, "'clients.count'"),
    ({"clients": {"tiers": [{"name": "a", "share": 0.4, "top_k": 1}]}}, "shares must sum to 1, they sum to 0.4"),
    ({"clients": {"tiers": [{"name": "a", "share": 1.0}]}}, "exactly one of top_k and beta"),
    ({"evaluation": {"every": -1}}, "'evaluation.every'"),
    ({"output": {"name": "../up"}}, "'output.name'"),
    ({"seed": -1}, "'seed'"),
]


@pytest.mark.parametrize(("sections", "words"), BAD, ids=[str(words) for _, words in BAD])
def test_a_bad_key_is_named_with_a_way_out(tmp_path: Path, sections: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(config(tmp_path, tmp_path, **sections))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_section_inside_a_partition_names_the_closest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key .*alfa'; did you mean 'alpha'"):
        parse(config(tmp_path, tmp_path, data={"partition": {"kind": "dirichlet", "alfa": 1, "alpha": 1}}))


UNUSABLE: list[tuple[dict[str, Any], type[EmberfedError], str]] = [
    (
        {"clients": {"tiers": [{"name": "big", "share": 1.0, "top_k": 9}]}},
        ConfigError,
        "top_k 9, the model can send a token to 8",
    ),
    ({"clients": {"count": 2}}, ConfigError, "gets none of the 2 clients"),
    ({"clients": {"count": 60}}, DataError, "cannot be divided over 60 clients"),
    ({"data": {"partition": {"kind": "natural", "by": "hospital"}}}, DataError, "no column 'hospital'"),
    ({"data": {"path": "absent.jsonl"}}, DataError, "absent.jsonl"),
    ({"data": {"template": "chat"}}, DataError, "no chat template"),
    ({"data": {"test_size": 4000}}, DataError, "leaves none to train on"),
    ({"model": {"path": "./absent"}}, ModelError, "absent"),
]


@pytest.mark.parametrize(("sections", "kind", "words"), UNUSABLE, ids=[words for *_, words in UNUSABLE])
def test_what_does_not_fit_model_or_data_is_found_before_anything_is_written(
    tiny_model_folder: Path, tiny_data: Path, sections: dict[str, Any], kind: type[EmberfedError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        assembly.gather(parse(config(tiny_model_folder, tiny_data, **sections)))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_nested_without_end_is_refused(tiny_model_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "deep.jsonl"
    data.write_text('{"a":' * 50_000 + "1" + "}" * 50_000)
    with pytest.raises(DataError, match=r"record 1 is nested deeper than 100 levels"):
        assembly.gather(parse(config(tiny_model_folder, data)))


def test_weights_that_are_not_finite_are_named(tiny_data: Path, tmp_path: Path) -> None:
    from builders import tiny_lm, tiny_tokenizer

    lm = tiny_lm()
    lm.model.layers[1].mlp.experts.down_proj.data[3, 0, 0] = float("nan")
    lm.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match=r"weight 'model.layers.1.mlp.experts.down_proj' holds values that are not"):
        assembly.gather(parse(config(tmp_path / "model", tiny_data)))


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_model_folder: Path, tiny_data: Path) -> None:
    values = config(tiny_model_folder, tiny_data, model={"tokenizer": str(_larger_tokenizer(tiny_data.parent))})
    with pytest.raises(ModelError, match=r"tokenizer has ids up to 64.* the model 64 embeddings"):
        assembly.gather(parse(values))


def _larger_tokenizer(folder: Path) -> Path:
    from builders import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one-too-many"])
    tokenizer.save_pretrained(folder / "larger")
    return folder / "larger"


def test_an_arena_is_not_a_configuration() -> None:
    with pytest.raises(ConfigError, match=r"^this is an arena, a grid of runs: give it to `emberfed compare`$"):
        parse({"base": "quickstart", "methods": {"A": {}}})
