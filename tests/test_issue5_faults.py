"""What careless users and hostile clients can do to tasks, sparse adapters and personal evaluation."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from builders import save_tiny_family, tiny_family_lm
from commands import invoke, write_config
from federations import bits, config
from safetensors.torch import load_file, save_file
from test_kill import start
from transformers import AutoModelForImageClassification

import emberfed
from emberfed import assembly
from emberfed.admission import Asked, payload_problem, scores_problem
from emberfed.clients import Budget, Client
from emberfed.config import parse
from emberfed.data.config import ImageDataConfig, TextClassDataConfig
from emberfed.data.image_sources import decoded
from emberfed.data.images import load_images, load_preprocessing
from emberfed.data.text_classes import load_texts
from emberfed.errors import ConfigError, DataError, EmberfedError, ModelError
from emberfed.events import Event, Notice
from emberfed.metrics import CLASSIFICATION, GENERATION
from emberfed.models.config import ModelConfig
from emberfed.models.foundation_model import FoundationModel
from emberfed.personal import Answers
from emberfed.records import ACTIVATION_COUNTS, SCORES, Bundle, Payload, Reply
from emberfed.seeds import Seeds
from emberfed.training import Trainer
from emberfed.worker import MemoryFolder


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ViT."""
    return save_tiny_family("vit", tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT of 128 positions, with its tokenizer."""
    return save_tiny_family("bert", tmp_path_factory.mktemp("bert"))


def draw_images(folder: Path, **classes: int) -> Path:
    """Write that many different 8 x 8 images of each class, a sub-folder for each."""
    draw = np.random.default_rng(7)
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            pixels = draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


def vision(model: Path, data: Path, /, **sections: Any) -> dict[str, Any]:
    """Return a config of three clients that train a sparse adapter for an instant."""
    values: dict[str, Any] = {
        "model": {"path": str(model)},
        "method": {"name": "fft_moe"},
        "adapter": {"num_experts": 4, "expert_size": 2},
        "data": {"task": "image_classification", "path": str(data), "test_size": 6, "client_test_share": 0.25},
        "clients": {"count": 3, "tiers": [{"name": "all", "share": 1.0, "adapter_top_k": 2}]},
        "training": {"rounds": 1, "batch_size": 4, "max_steps": 1},
        "evaluation": {"batch_size": 8},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return values


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of two classes."""
    return draw_images(tmp_path_factory.mktemp("pictures"), a=18, b=18)


@pytest.fixture(scope="module")
def trained(vit: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round. Copy it before changing it."""
    return emberfed.run(vision(vit, pictures), output=tmp_path_factory.mktemp("trained") / "run").path


def check_line(error: BaseException, *words: str) -> None:
    """Check that an error is one line with these words."""
    assert "\n" not in str(error)
    for word in words:
        assert re.search(word, str(error)), str(error)


# Images ------------------------------------------------------------------------------------------------------------


def images_config(folder: Path, **keys: Any) -> ImageDataConfig:
    return ImageDataConfig(task="image_classification", path=str(folder), **{"test_size": 4, **keys})


def put_animation(folder: Path) -> None:
    draw = np.random.default_rng(1)
    frames = [PIL.Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)) for _ in range(3)]
    frames[0].save(folder / "a" / "moving.gif", save_all=True, append_images=frames[1:])


def put_pipe(folder: Path) -> None:
    os.mkfifo(folder / "a" / "pipe.png")


def put_loose(folder: Path) -> None:
    shutil.copy(folder / "a" / "00.png", folder / "loose.PNG")


def put_odd_class(folder: Path) -> None:
    odd = folder / os.fsdecode(b"odd\xff")
    odd.mkdir()
    shutil.copy(folder / "a" / "00.png", odd)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (put_animation, r"moving\.gif holds 3 pictures"),
        (put_pipe, r"a/pipe\.png is no file"),
        (put_loose, r"image loose\.PNG lies beside the classes' folders"),
        (put_odd_class, "not UTF-8; rename"),
    ],
)
def test_what_lies_among_images_is_told_by_name(spoil: Callable[[Path], None], words: str, tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", a=8, b=8)
    spoil(folder)
    with pytest.raises(DataError) as caught:
        load_images(images_config(folder), Seeds(0))
    check_line(caught.value, words)


def test_a_text_beside_the_classes_is_no_image_without_a_class(tmp_path: Path) -> None:
    folder = draw_images(tmp_path / "images", a=8, b=8)
    (folder / "LICENSE.txt").write_text("free")
    assert load_images(images_config(folder), Seeds(0)).report.read == 16


def test_a_record_without_image_is_told_by_number() -> None:
    with pytest.raises(DataError, match="record 3 has no image"):
        decoded(None, "data x, record 3")


def test_a_damaged_saved_set_is_one_line(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["w3"], "label": ["a"]}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read"):
        load_texts(TextClassDataConfig(task="text_classification", path=str(tmp_path / "saved")), Seeds(0))


@pytest.mark.parametrize(
    "settings", [{"image_std": [0.0, 0.0, 0.0]}, {"rescale_factor": 0.0}, {"rescale_factor": 1e40}]
)
def test_processing_that_leaves_nothing_of_images_is_refused(
    settings: dict[str, Any], vit: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "vit"
    shutil.copytree(vit, folder)
    usual = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps({**usual, **settings}))
    with pytest.raises(ModelError) as caught:
        load_preprocessing(ModelConfig(path=str(folder)))
    check_line(caught.value, "makes every image the same, or not finite", "preprocessor_config.json")


def test_a_tokenizer_for_images_is_refused(vit: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.tokenizer is 'x', but a model of images has none"):
        load_preprocessing(ModelConfig(path=str(vit), tokenizer="x"))


def test_a_class_that_clients_keep_apart_entirely_is_an_error(vit: Path, tmp_path: Path) -> None:
    """Two images of class c: with a share of a half, some seed keeps apart all that were not held out."""
    folder = draw_images(tmp_path / "images", a=12, b=12, c=2)
    told = []
    for seed in range(12):
        values = vision(vit, folder, data={"test_size": 2, "client_test_share": 0.5}, clients={"count": 2})
        try:
            material = assembly.gather(parse({**values, "seed": seed}))
        except DataError as error:
            told.append(str(error))
        else:
            labels = {example.label for shard in material.shards.values() for example in shard.examples}
            assert labels == {0, 1, 2}
    assert any("class 'c' are kept apart on clients (data.client_test_share)" in line for line in told)


# Texts -------------------------------------------------------------------------------------------------------------


def write_texts(path: Path, **first: Any) -> Path:
    """Write 24 texts of two classes; keys given replace the first record's."""
    rows: list[dict[str, Any]] = [{"text": f"w{10 + n} w{20 + n}", "label": "ab"[n % 2]} for n in range(24)]
    rows[0] |= first
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("label", ["", "  ", "\t"])
def test_a_blank_label_is_no_class(label: str, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.jsonl", label=label)
    with pytest.raises(DataError, match=r"record 1: label '.*' is blank"):
        load_texts(TextClassDataConfig(task="text_classification", path=str(path), test_size=4), Seeds(0))


def test_a_cell_left_empty_is_no_class(tmp_path: Path) -> None:
    path = tmp_path / "texts.csv"
    path.write_text("text,label\nw3,a\nw4,\nw5,b\n")
    with pytest.raises(DataError, match="record 2: label '' is blank"):
        load_texts(TextClassDataConfig(task="text_classification", path=str(path), test_size=1), Seeds(0))


def test_files_of_texts_are_clients(bert: Path, tmp_path: Path) -> None:
    """As files of instructions are: the column `client` stays, and with it what a partition may use."""
    for name in ("one", "two"):
        rows = [{"text": f"{name} w{10 + n}", "label": "ab"[n % 2]} for n in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"task": "text_classification", "path": str(tmp_path), "test_size": 2}
    corpus = load_texts(TextClassDataConfig(**keys), Seeds(0))
    assert set(corpus.train.column_names) == {"text", "category", "label", "client"}
    assert all(record["text"].startswith(record["client"]) for record in corpus.train)


def test_texts_longer_than_a_model_has_positions_are_refused_before_anything_runs(bert: Path, tmp_path: Path) -> None:
    path = write_texts(tmp_path / "texts.jsonl", text="w3 " * 200)
    data = {"path": str(path), "task": "text_classification", "max_length": 129, "test_size": 4}
    values = {**vision(bert, path), "data": data}
    for command in (("plan",), ("run", "--output", tmp_path / "run")):
        done = invoke(*command, write_config(tmp_path / "config.yaml", values))
        assert done.exit_code == 2
        assert "data.max_length 129 is more than the 128 positions that this bert model has" in done.stderr
    assert not (tmp_path / "run").exists()
    assembly.gather(parse({**values, "data": {**data, "max_length": 128}}))


@pytest.mark.parametrize(("family", "positions"), [("roberta", 129), ("gpt2", 128), ("llama", None), ("olmoe", None)])
def test_positions_of_families(family: str, positions: int | None) -> None:
    """The tiny RoBERTa's table has 130 rows, of which that of padding, the first, is no position."""
    model = FoundationModel(tiny_family_lm(family))
    assert model.positions == positions


def test_answers_need_positions_too(tmp_path: Path, tiny_data: Path) -> None:
    folder = save_tiny_family("gpt2", tmp_path / "gpt2")
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, "rank": 2}]
    values = config(folder, tiny_data, method={"name": "homolora"}, clients={"tiers": tiers})
    values["data"]["max_length"], values["evaluation"]["max_new_tokens"] = 120, 9
    with pytest.raises(ConfigError, match=r"evaluation\.max_new_tokens = 129 is more than the 128 positions"):
        assembly.gather(parse(values))


# Asking for numbers of active experts ------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", [[True], [1, 1], [], [0], [1.0], 2, "12"])
def test_numbers_of_active_experts_are_different_whole_numbers(asked: Any, trained: Path) -> None:
    with pytest.raises(ConfigError, match="expected different whole numbers from 1"):
        emberfed.evaluate(trained, adapter_top_k=asked)


def test_the_other_kind_of_experts_is_refused(
    trained: Path, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"FFT-MoE chooses among its adapter's experts.*--adapter-top-k"):
        emberfed.evaluate(trained, top_k=[1])
    values = config(tiny_model_folder, tiny_data, training={"rounds": 1, "max_steps": 1})
    lora = emberfed.run(values, output=tmp_path / "lora").path
    with pytest.raises(ConfigError, match="no adapter beside the FFN, so adapter_top_k has no effect"):
        emberfed.evaluate(lora, adapter_top_k=[1])


def test_a_method_without_keys_says_that_nothing_is_allowed(vit: Path, pictures: Path, tmp_path: Path) -> None:
    values = {**vision(vit, pictures, method={"name": "linear_probe"}), "adapter": {"zebra": 1}}
    done = invoke("plan", write_config(tmp_path / "config.yaml", values))
    assert (done.exit_code, done.stderr.strip()) == (
        2,
        "emberfed: error: unknown key 'adapter.zebra'; allowed here: nothing",
    )


# Adapters from folders ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_k", [True, 1.0, "2"])
def test_loading_takes_whole_numbers_alone(top_k: Any, trained: Path, vit: Path) -> None:
    model = AutoModelForImageClassification.from_pretrained(vit, num_labels=2, ignore_mismatched_sizes=True)
    with pytest.raises(ConfigError, match=f"adapter_top_k {top_k!r} is impossible"):
        emberfed.load_adapter(model, trained / "final", top_k=top_k)


@pytest.mark.parametrize("model", [None, "vit", torch.nn.Linear(2, 2)])
def test_loading_into_no_model_is_one_line(model: Any, trained: Path) -> None:
    with pytest.raises(ModelError, match=f"a model of transformers, found {type(model).__name__}"):
        emberfed.load_adapter(model, trained / "final")


def test_an_adapter_that_is_not_finite_is_damaged(trained: Path, vit: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree((trained / "final").resolve(), folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["layers.1.adapter.router.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    model = AutoModelForImageClassification.from_pretrained(vit, num_labels=2, ignore_mismatched_sizes=True)
    with pytest.raises(ModelError, match=r"'layers\.1\.adapter\.router\.weight' holds values that are not finite"):
        emberfed.load_adapter(model, folder)


# Clients that lie --------------------------------------------------------------------------------------------------


def test_one_expert_cannot_have_been_given_more_tokens_than_there_were(vit: Path, pictures: Path) -> None:
    """Sums alone let a client claim k times its tokens for one expert, and so k times its weight there."""
    checked = parse(vision(vit, pictures))
    material = assembly.gather(checked)
    method = checked.method_type(checked.method, checked.adapter, Trainer(checked.training))
    state = method.init(material.model, material.budgets, Seeds(0))
    client = material.clients[0]
    download = method.dispatch(state, client, 1)
    shard, seeds = material.shards[client.id], Seeds(0).at(round=1, client=client.id)
    upload = method.fit(material.model, download, client, shard, Bundle(), seeds).upload
    asked = Asked(1, client.id, method.expects(state, download), 1, 2)
    assert payload_problem(Payload(1, client.id, upload), asked) is None
    counts = torch.zeros_like(upload.tensors[ACTIVATION_COUNTS])
    counts[:, 0] = 2 * upload.meta["tokens"]
    lie = Bundle({**upload.tensors, ACTIVATION_COUNTS: counts}, upload.meta)
    problem = payload_problem(Payload(1, client.id, lie), asked)
    assert problem is not None
    assert f"an expert was given {2 * upload.meta['tokens']} tokens, of {upload.meta['tokens']}" in problem


HONEST: dict[str, Any] = {"accuracy": 0.5, "loss": 1.0, "examples": 4}


def scored(client: str, scores: Any) -> Reply:
    return Reply(1, client, Payload(1, client, Bundle(meta={SCORES: scores})).to_bytes(), {"seconds": 2.0})


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        (HONEST, None),
        ({**HONEST, "client": "c1"}, "foreign score 'client'"),
        ({**HONEST, "event": "round"}, "foreign score 'event'"),
        ({**HONEST, "perplexity": 1.0}, "foreign score 'perplexity'"),
        ({**HONEST, "loss": None}, None),
        ({**HONEST, "loss": "low"}, "'loss' must be null or a number"),
    ],
)
def test_scores_hold_what_is_asked_and_nothing_else(scores: dict[str, Any], problem: str | None) -> None:
    """What a client adds would stand in metrics.jsonl, over its own name and the kind of its line."""
    found = scores_problem(scored("c0", scores), 1, {"c0", "c1"}, CLASSIFICATION)
    assert found is None if problem is None else problem in str(found)


def test_perplexity_is_checked_where_it_belongs() -> None:
    scores: dict[str, Any] = {"rouge_l": 0.5, "loss": 1.0, "perplexity": 2.0, "examples": 4}
    assert scores_problem(scored("c0", scores), 1, {"c0"}, GENERATION) is None
    problem = scores_problem(scored("c0", {**scores, "perplexity": "<b>"}), 1, {"c0"}, GENERATION)
    assert "'perplexity' must be null or a number" in str(problem)


def test_who_answers_twice_does_not_count() -> None:
    """As with uploads: neither answer counts, nor their seconds, whatever a third one says."""
    told: list[Event] = []
    clients = [Client(f"c{number}", Budget("all", 1, None, 2), 8) for number in range(2)]
    answers = Answers(clients, CLASSIFICATION, 0, told.append)
    for client in ("c0", "c1", "c1", "c1"):
        answers.receive(scored(client, HONEST))
    line, summary = answers.lines()
    assert (line["client"], summary["clients"], summary["seconds"]) == ("c0", 1, 2.0)
    assert [event.message for event in told if isinstance(event, Notice)] == [
        "round 0: no personal evaluation of c1: answered twice"
    ] * 2


# What clients keep -------------------------------------------------------------------------------------------------

GATE = "layers.0.adapter.router.weight"


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Return what replaces a tensor of a memory's file, or takes it out."""

    def carry_out(file: Path) -> None:
        kept = Bundle.from_bytes(file.read_bytes())
        tensors = dict(kept.tensors)
        made = change(tensors.pop(name, torch.zeros(1)))
        file.write_bytes(Bundle(tensors if made is None else {**tensors, name: made}, kept.meta).to_bytes())

    return carry_out


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), r"memory .*/c1/000001\.safetensors is damaged"),
        (lambda file: file.write_bytes(b""), r"memory .*/c1/000001\.safetensors is damaged"),
        (changed(GATE, lambda gate: gate[:-1].contiguous()), r"'layers.0.* has shape \(3, 32\), expected \(4, 32\)"),
        (changed(GATE, lambda gate: gate * torch.nan), "'layers.0.*' is not finite"),
        (changed(GATE, lambda _: None), "'layers.0.*' is missing"),
        (changed("layers.0.adapter.experts.up_proj", lambda _: torch.ones(4, 32, 2)), "up_proj' is foreign"),
        (changed(ACTIVATION_COUNTS, lambda counts: counts[:1].contiguous()), r"has shape \(1, 4\), expected \(2, 4\)"),
    ],
)
def test_damaged_memory_is_told_and_costs_that_client_alone(
    spoil: Callable[[Path], None], words: str, trained: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    spoil(run / "memory" / "c1" / "000001.safetensors")
    emberfed.resume(run, rounds=2)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["event"] == "round"][-1]
    assert last["replied"] == ["c0", "c2"]
    assert re.search(words, last["failed"]["c1"])
    assert "remove" in last["failed"]["c1"]
    assert [line["client"] for line in lines if line["event"] == "personal" and line["round"] == 2] == ["c0", "c2"]


def test_who_lost_its_memory_begins_anew(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, symlinks=True)
    shutil.rmtree(run / "memory" / "c1")
    emberfed.resume(run, rounds=2)
    rounds = [line for line in emberfed.Run(run).metrics() if line["event"] == "round"]
    assert rounds[-1]["replied"] == ["c0", "c1", "c2"]


def test_other_files_among_memories_are_left_alone(tmp_path: Path) -> None:
    memory = MemoryFolder(tmp_path)
    for round in range(1, 6):
        memory.write("c0", round, Bundle(meta={"round": round}))
    stray = tmp_path / "c0" / "notes.safetensors"
    stray.write_bytes(b"mine")
    memory.write("c0", 6, Bundle(meta={"round": 6}))
    assert memory.read("c0", 6).meta == {"round": 5}
    assert stray.read_bytes() == b"mine"


@pytest.mark.slow
def test_killed_in_personal_evaluation_and_resumed_gives_the_same_bits(
    vit: Path, pictures: Path, tmp_path: Path
) -> None:
    """SIGKILL when all clients have answered round 2 and, as a rule, while the delayed personal answers come in."""
    slow = {"name": "flaky", "delay_seconds": 0.2}
    values = vision(vit, pictures, training={"rounds": 3}, engine=slow)
    whole = emberfed.run(vision(vit, pictures, training={"rounds": 3}), output=tmp_path / "whole").path
    run = tmp_path / "run"
    process = start("run", write_config(tmp_path / "config.yaml", values), "--output", run)
    uploads = run / "rounds" / "0002.partial" / "clients"
    while process.poll() is None and len(list(uploads.glob("*.safetensors"))) < 3:
        time.sleep(0.005)
    time.sleep(0.2)  # the global evaluation takes a tenth of that, three personal answers twice as much
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    emberfed.resume(run)
    assert bits(run) == bits(whole)
    ends = ("seconds", "peak_memory_bytes")
    figures = [
        [{key: value for key, value in line.items() if key not in ends} for line in emberfed.Run(path).metrics()]
        for path in (run, whole)
    ]
    assert [line for line in figures[0] if line["event"].startswith("personal")] == [
        line for line in figures[1] if line["event"].startswith("personal")
    ]


@pytest.mark.parametrize("fault", ["drop", "raise", "garbage", "stranger", "old_round", "twice"])
def test_no_fault_of_one_client_spoils_what_is_said_of_the_others(
    fault: str, vit: Path, pictures: Path, tmp_path: Path
) -> None:
    values = vision(vit, pictures, engine={"name": "flaky", "faults": {"c1": fault}})
    run = emberfed.run(values, output=tmp_path / "run")
    lines = run.metrics()
    assert [line["client"] for line in lines if line["event"] == "personal"] == ["c0", "c2"] * 2
    assert [line["clients"] for line in lines if line["event"] == "personal_summary"] == [2, 2]
    notices = [json.loads(line)["message"] for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert sum("no personal evaluation of c1" in message for message in notices) == 2


def test_errors_are_one_line(vit: Path, pictures: Path) -> None:
    for sections in (
        {"adapter": {"layers": [7]}},
        {"adapter": {"num_experts": 1}},
        {"clients": {"tiers": [{"name": "all", "share": 1.0, "adapter_top_k": 5}]}},
        {"clients": {"tiers": [{"name": "all", "share": 1.0, "top_k": 1}]}},
        {"data": {"partition": {"kind": "label", "labels_per_client": 3}}},
        {"data": {"partition": {"kind": "shards", "shards_per_client": 11}}},
    ):
        with pytest.raises(EmberfedError) as caught:
            emberfed.run(vision(vit, pictures, **sections), output="never")
        check_line(caught.value)
    assert not Path("never").exists()
