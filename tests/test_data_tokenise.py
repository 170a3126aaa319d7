"""Templates, tokenising, truncation, batches: the loss is on the response and the end of text, never on nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from builders import tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from emberfed.data.config import DataConfig, Template
from emberfed.data.loading import load
from emberfed.data.templates import prompt
from emberfed.data.tokenise import (
    IGNORED,
    Example,
    ResponseShard,
    ShardReport,
    check_vocabulary,
    collate,
    end_of_text,
    left_padded,
    tokenise,
)
from emberfed.errors import DataError, ModelError
from emberfed.seeds import Seeds

PAD, EOS = 0, 1
CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
WITH_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
Do it.

### Input:
With this.

### Response:
"""
WITHOUT_INPUT = """Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

### Instruction:
Do it.

### Response:
"""


def row(instruction: str = "Do it.", context: str = "", response: str = "w3", **more: Any) -> dict[str, Any]:
    record = {"instruction": instruction, "context": context, "response": response, "category": "", "history": []}
    return {**record, **more}


def rows(*records: dict[str, Any]) -> datasets.Dataset:
    return datasets.Dataset.from_list(list(records))


def words(count: int, first: int = 3) -> str:
    return " ".join(f"w{first + number % (64 - first)}" for number in range(count))


def shard(*records: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None = None, **options: Any) -> ResponseShard:
    config = DataConfig(**({"template": "short", "max_length": 64} | options))
    return tokenise(rows(*records), tokenizer or tiny_tokenizer(), config, "c0")


def beginning(tokenizer: PreTrainedTokenizerFast, template: str = "w63 $A") -> PreTrainedTokenizerFast:
    """The tokenizer, putting w63 before (and perhaps the end of text after) every text."""
    special = [("w63", 63), ("<eos>", EOS)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    tokenizer.bos_token = "w63"
    return tokenizer


def chatty(template: str = CHAT) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def numbers(examples: int, seed: int = 0) -> tuple[Example, ...]:
    """Examples of different lengths with different content."""
    draw = np.random.default_rng(seed)
    made = []
    for _ in range(examples):
        length = int(draw.integers(2, 12))
        ids = draw.integers(2, 64, size=length).astype(np.int32)
        made.append(Example(ids, int(draw.integers(1, length)), "", ""))
    return tuple(made)


# Templates


@pytest.mark.parametrize(
    ("template", "context", "expected"),
    [
        ("alpaca", "With this.", WITH_INPUT),
        ("alpaca", "", WITHOUT_INPUT),
        ("short", "With this.", WITH_INPUT.split("\n\n", 1)[1]),
        ("short", "", WITHOUT_INPUT.split("\n\n", 1)[1]),
        ("chat", "With this.", "<user>Do it.\n\nWith this.<assistant>"),
        ("chat", "", "<user>Do it.<assistant>"),
    ],
)
def test_prompts_are_these_texts(template: Template, context: str, expected: str) -> None:
    assert prompt(row(context=context), template, chatty()) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            "short",
            "### System:\nBe kind.\n\n### Instruction:\nHi.\n\n### Response:\nHello.\n\n"
            "### Instruction:\nDo it.\n\n### Response:\n",
        ),
        ("chat", "<system>Be kind.<user>Hi.<assistant>Hello.<user>Do it.<assistant>"),
    ],
)
def test_history_comes_before_the_instruction(template: Template, expected: str) -> None:
    history = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
    ]
    assert prompt(row(history=history), template, chatty()) == expected
    alpaca = prompt(row(history=history), "alpaca", chatty())
    assert alpaca.endswith("### Response:\nHello.\n\n### Instruction:\nDo it.\n\n### Response:\n")


def test_chat_needs_a_chat_template() -> None:
    with pytest.raises(DataError, match="no chat template; use 'alpaca' or 'short'"):
        shard(row(), template="chat")


def test_a_chat_template_that_refuses_the_turns_is_one_line() -> None:
    fussy = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}hello"
    history = [{"role": "system", "content": "Be kind."}]
    with pytest.raises(DataError, match="no system role.*use data.template 'alpaca' or 'short'"):
        shard(row(history=history), tokenizer=chatty(fussy), template="chat")


# One example


def test_an_example_is_prompt_response_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    made = shard(row("w4 w5", "", "w6 w7 w8", category="qa"))
    (example,) = made.examples
    opening = tokenizer(prompt(row("w4 w5"), "short", tokenizer))["input_ids"]
    assert example.input_ids.tolist() == [*opening, 6, 7, 8, EOS]
    assert example.input_ids.dtype == np.int32
    assert (example.prompt_length, example.target_tokens) == (len(opening), 4)
    assert (example.reference, example.category) == ("w6 w7 w8", "qa")
    assert made.report == ShardReport(1, 4, 0, 0, 0)
    assert made.report.json()["target_tokens"] == 4
    assert made.pad_token_id == PAD


def test_the_beginning_of_text_is_put_before_the_prompt_only() -> None:
    (example,) = shard(row("w4", "", "w6"), tokenizer=beginning(tiny_tokenizer())).examples
    ids = example.input_ids.tolist()
    assert ids[0] == 63
    assert ids.count(63) == 1
    assert ids[example.prompt_length :] == [6, EOS]


def test_an_end_of_text_the_tokenizer_appends_does_not_cut_prompt_from_response() -> None:
    plain = shard(row("w4", "", "w6")).examples[0].input_ids.tolist()
    (example,) = shard(row("w4", "", "w6"), tokenizer=beginning(tiny_tokenizer(), "w63 $A <eos>")).examples
    assert example.input_ids.tolist() == [63, *plain]


def test_chat_prompts_get_no_second_beginning_of_text() -> None:
    tokenizer = beginning(chatty("w63 {{ messages[-1]['content'] }}"))
    (example,) = shard(row("w4 w5", "", "w6"), tokenizer=tokenizer, template="chat").examples
    assert example.input_ids.tolist() == [63, 4, 5, 6, EOS]


def test_special_tokens_written_in_the_data_are_text() -> None:
    (example,) = shard(row("w4 <eos>", "", "w6 <eos> w7")).examples
    assert example.input_ids.tolist().count(EOS) == 1


def test_a_tokenizer_without_padding_pads_with_its_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert shard(row(), tokenizer=tokenizer).pad_token_id == EOS


def test_a_tokenizer_without_end_of_text_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="no end-of-text token"):
        shard(row(), tokenizer=tokenizer)
    assert end_of_text(tiny_tokenizer()) == EOS


def test_vocabularies_must_fit() -> None:
    check_vocabulary(tiny_tokenizer(), 64)
    check_vocabulary(tiny_tokenizer(), 100)
    with pytest.raises(ModelError, match=r"ids up to 63, the model 63 embeddings"):
        check_vocabulary(tiny_tokenizer(), 63)
    more = tiny_tokenizer()
    more.add_tokens(["extra"])
    with pytest.raises(ModelError, match="ids up to 64"):
        check_vocabulary(more, 64)


# Truncation


@pytest.mark.parametrize(
    ("prompt_words", "response_words", "kept_prompt", "kept_target", "cut"),
    [
        (10, 5, 10, 6, (0, 0)),  # 16 of 16 tokens: nothing is cut
        (11, 5, 10, 6, (1, 0)),  # the prompt makes room
        (40, 3, 12, 4, (1, 0)),
        (40, 40, 8, 8, (1, 1)),  # the prompt keeps half, the response the other half
        (4, 40, 4, 12, (0, 1)),  # a short prompt leaves its part to the response
        (8, 8, 8, 8, (0, 1)),  # 17 tokens: only the end of text goes
    ],
)
def test_truncation_by_hand(
    prompt_words: int, response_words: int, kept_prompt: int, kept_target: int, cut: tuple[int, int]
) -> None:
    opening, response = words(prompt_words), words(response_words, 5)
    tokenizer = chatty("{{ messages[-1]['content'] }}")
    made = shard(row(opening, "", response), tokenizer=tokenizer, template="chat", max_length=16)
    (example,) = made.examples
    ids = example.input_ids.tolist()
    assert ids[: example.prompt_length] == tokenizer(opening)["input_ids"][-kept_prompt:]
    assert ids[example.prompt_length :] == [*tokenizer(response)["input_ids"], EOS][:kept_target]
    assert (made.report.truncated_prompts, made.report.truncated_responses) == cut


def test_a_cut_prompt_keeps_its_beginning_and_its_end() -> None:
    tokenizer = beginning(tiny_tokenizer())
    whole = shard(row(words(50), "", "w6"), tokenizer=tokenizer, max_length=512).examples[0]
    cut = shard(row(words(50), "", "w6"), tokenizer=tokenizer, max_length=20).examples[0]
    assert cut.input_ids.tolist() == [63, *whole.input_ids.tolist()[-19:]]


def test_texts_longer_than_the_models_context_are_cut_without_a_warning(capfd: pytest.CaptureFixture[str]) -> None:
    assert len(shard(row(words(500), "", words(500))).examples[0].input_ids) == 64
    assert capfd.readouterr() == ("", "")


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 60)), min_size=1, max_size=6),
    st.integers(8, 70),
    st.sampled_from(["alpaca", "short", "chat"]),
    st.sampled_from([tiny_tokenizer, lambda: beginning(tiny_tokenizer())]),
)
def test_every_example_has_a_prompt_and_a_target_within_the_length(
    sizes: list[tuple[int, int]],
    max_length: int,
    template: Template,
    make: Callable[[], PreTrainedTokenizerFast],
) -> None:
    tokenizer = make()
    tokenizer.chat_template = CHAT
    records = [row(words(asked), "", words(answered, 7)) for asked, answered in sizes]
    made = shard(*records, tokenizer=tokenizer, template=template, max_length=max_length)
    assert made.report.examples == len(made.examples) == len(records)
    assert made.report.without_target == 0
    batch = collate(made.examples, made.pad_token_id)
    assert (batch.labels[:, 1:] != IGNORED).any(dim=1).all()  # also after the shift of a causal model
    for record, example in zip(records, made.examples, strict=True):
        assert 1 <= example.prompt_length < len(example.input_ids) <= max_length
        target = [*tokenizer(record["response"], add_special_tokens=False)["input_ids"], EOS]
        kept = example.input_ids[example.prompt_length :].tolist()
        assert kept == target[: len(kept)]
        assert len(kept) >= min(len(target), max_length - max_length // 2)
        if len(kept) < len(target):
            assert len(example.input_ids) == max_length
    assert made.report.target_tokens == int((batch.labels != IGNORED).sum())


def test_responses_the_tokenizer_cannot_see_are_dropped_and_counted() -> None:
    made = shard(row(response="w3"), row(response=" \n"), row(response=" "), row(response="w4"))
    assert [example.reference for example in made.examples] == ["w3", "w4"]
    assert (made.report.examples, made.report.without_target) == (2, 2)


def test_a_shard_without_any_target_names_its_client() -> None:
    with pytest.raises(DataError, match="c0: none of the 2 examples has a response"):
        shard(row(response=" "), row(response="\n"))


def test_an_empty_shard_names_its_client_and_what_to_do() -> None:
    with pytest.raises(DataError, match="c0 has no examples; use fewer clients"):
        tokenise(rows(row()).select([]), tiny_tokenizer(), DataConfig(), "c0")


# Batches


@given(st.integers(1, 12), st.integers(0, 20))
def test_collate_pads_right_and_labels_only_targets(count: int, seed: int) -> None:
    examples = numbers(count, seed)
    batch = collate(examples, PAD)
    length = max(len(example.input_ids) for example in examples)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.labels.shape == (count, length)
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}
    for position, example in enumerate(examples):
        ids = example.input_ids.tolist()
        padding = length - len(ids)
        target = ids[example.prompt_length :]
        assert batch.input_ids[position].tolist() == ids + [PAD] * padding
        assert batch.attention_mask[position].tolist() == [1] * len(ids) + [0] * padding
        assert batch.labels[position].tolist() == [IGNORED] * example.prompt_length + target + [IGNORED] * padding


@given(st.integers(1, 12), st.integers(0, 20))
def test_prompts_are_padded_left_and_hold_no_response(count: int, seed: int) -> None:
    examples = numbers(count, seed)
    made = left_padded(examples, PAD)
    length = max(example.prompt_length for example in examples)
    assert made.input_ids.shape == made.attention_mask.shape == (count, length)
    for position, example in enumerate(examples):
        ids = example.input_ids[: example.prompt_length].tolist()
        padding = length - len(ids)
        assert made.input_ids[position].tolist() == [PAD] * padding + ids
        assert made.attention_mask[position].tolist() == [0] * padding + [1] * len(ids)


def test_decoded_labels_are_the_response_and_the_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    records = [row(words(5 + number), "", words(1 + 3 * number, 9)) for number in range(4)]
    batch = collate(shard(*records).examples, PAD)
    for record, labels in zip(records, batch.labels, strict=True):
        assert tokenizer.decode(labels[labels != IGNORED]) == f"{record['response']} <eos>"


@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 9))
def test_batches_cover_every_example_once(count: int, size: int, seed: int) -> None:
    examples = numbers(count)
    made = ResponseShard(examples, ShardReport(count, 0, 0, 0, 0), PAD)
    batches = list(made.batches(size, Seeds(seed).torch("order")))
    assert Counter(id(example) for batch in batches for example in batch) == Counter(map(id, examples))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert 1 <= len(batches[-1]) <= size
    again = list(made.batches(size, Seeds(seed).torch("order")))
    assert [list(map(id, batch)) for batch in again] == [list(map(id, batch)) for batch in batches]


def test_the_generator_decides_the_order() -> None:
    made = ResponseShard(numbers(30), ShardReport(30, 0, 0, 0, 0), PAD)
    orders = [[id(e) for batch in made.batches(7, Seeds(seed).torch("order")) for e in batch] for seed in range(3)]
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != [id(example) for example in made.examples]


def test_batches_keep_the_shard_and_the_global_stream_as_they_are() -> None:
    made = ResponseShard(numbers(9), ShardReport(9, 0, 0, 0, 0), PAD)
    before, state = [example.input_ids.tolist() for example in made.examples], torch.get_rng_state()
    collated = [collate(batch, PAD) for batch in made.batches(4, Seeds(0).torch("order"))]
    assert len(collated) == 3
    assert [example.input_ids.tolist() for example in made.examples] == before
    assert torch.equal(torch.get_rng_state(), state)


# Real tokenizers


@pytest.mark.parametrize("folder", ["models/olmoe-en-16m", "tokenizers/olmo"])
@pytest.mark.parametrize("template", ["alpaca", "short"])
def test_real_text_decodes_to_the_response(shared: Path, folder: str, template: Template) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / folder, local_files_only=True)
    config = DataConfig(path=str(shared / "dolly" / "dolly.jsonl"), limit=300, template=template, max_length=256)
    records = load(config, Seeds(0)).train
    made = tokenise(records, tokenizer, config, "all")
    assert made.report.examples == len(records)
    whole = 0
    for record, example in zip(records, made.examples, strict=True):
        assert len(example.input_ids) <= 256
        kept = example.input_ids[example.prompt_length :]
        if kept[-1] == tokenizer.eos_token_id:
            assert tokenizer.decode(kept[:-1]) == record["response"]
            whole += 1
    assert whole == len(records) - made.report.truncated_responses


def test_the_prompt_ends_where_the_response_begins(shared: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared / "tokenizers" / "olmo", local_files_only=True)
    (example,) = shard(row("Say hello.", "", "Hello."), tokenizer=tokenizer, template="alpaca").examples
    assert tokenizer.decode(example.input_ids[: example.prompt_length]) == WITHOUT_INPUT.replace("Do it", "Say hello")
