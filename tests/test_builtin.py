"""The built-in world: its exercises against independent solvers, its plain text, and the model that ships with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from emberfed.builtin import corpus, model_path, plain_text
from emberfed.builtin.phrases import INSTRUCTIONS, QUESTIONS
from emberfed.builtin.pretrain import Recipe, batches, learning_rate, new_model, pretrain, save, train_tokenizer
from emberfed.builtin.words import (
    ANIMALS,
    COLOURS,
    DAYS,
    GOODS,
    GROUP_PLURALS,
    GROUPS,
    JOBS,
    MONTHS,
    PEOPLE,
    PLACES,
    TOWNS,
    VERBS,
    a,
    count_of,
    joined,
    plural,
)
from emberfed.seeds import Seeds

CATEGORIES = {
    "extraction", "closed_qa", "classification", "summarizing",
    "rewriting", "ordering", "arithmetic", "listing",
}  # fmt: skip
Record = dict[str, str]


@cache
def records(category: str, seed: int = 0) -> list[Record]:
    """Two hundred or so records of one category."""
    return [record for record in corpus(1600, Seeds(seed)) if record["category"] == category]


def items(response: str) -> list[str]:
    return re.split(r", | and ", response)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# ------------------------------------------------------------------------------------------------ the corpus


def test_same_seed_same_corpus_and_other_seed_another() -> None:
    assert corpus(64, Seeds(3)) == corpus(64, Seeds(3))
    assert corpus(64, Seeds(3)) != corpus(64, Seeds(4))


@settings(max_examples=25, deadline=None)
@given(size=st.integers(0, 100), seed=st.integers(0, 2**31))
def test_records_are_well_formed_balanced_and_never_repeated(size: int, seed: int) -> None:
    made = corpus(size, Seeds(seed))
    counts = Counter(record["category"] for record in made)
    assert len(made) == size
    assert set(counts) <= CATEGORIES
    assert max(counts.values(), default=0) - min((counts[category] for category in CATEGORIES), default=0) <= 1
    assert len({(record["instruction"], record["context"]) for record in made}) == size
    for record in made:
        assert list(record) == ["instruction", "context", "response", "category"]
        assert 2 <= len(record["response"].split()) <= 14
        assert record["instruction"]
        assert not set("{}") & set("".join(record.values())), "a field was left unfilled"


def test_templates_cannot_be_memorised() -> None:
    made = corpus(2000, Seeds(0))
    assert len({record["response"] for record in made}) > 0.85 * len(made)
    shapes = {re.sub(r"\b[A-Z]\w+|\d+", "_", record["instruction"]) for record in made}
    assert len(shapes) > 150


@pytest.mark.parametrize("category", sorted(CATEGORIES))
def test_what_an_answer_names_is_in_the_text_or_the_question(category: str) -> None:
    """Names, towns, days and things are never made up: every one in an answer can be read somewhere."""
    proper = {*PEOPLE, *TOWNS, *GOODS, *ANIMALS, *PLACES} - {"file"}
    for record in records(category):
        read = set(re.findall(r"\w+", f"{record['instruction']} {record['context']}".lower()))
        named = {word for word in proper if re.search(rf"\b{word}\b", record["response"])}
        assert {word.lower() for word in named} <= read, record


VOCABULARY = {
    "people": PEOPLE, "towns": TOWNS, "jobs": JOBS, "animals": ANIMALS,
    "colours": COLOURS, "goods": GOODS, "days": DAYS, "places": PLACES,
}  # fmt: skip
PATTERNS = {"prices": r"(\d+) coins", "ages": r"(?:At |turned |is )(\d+)"}


def test_extraction_finds_everything_of_its_kind_and_nothing_else() -> None:
    checked = Counter[str]()
    for record in records("extraction"):
        kind = next(kind for kind in (*VOCABULARY, *PATTERNS) if re.search(rf"\b{kind}\b", record["instruction"]))
        if kind in PATTERNS:
            unit = " coins" if kind == "prices" else ""
            expected = [f"{number}{unit}" for number in re.findall(PATTERNS[kind], record["context"])]
        else:
            expected = [word for word in re.findall(r"\w+", record["context"]) if word in VOCABULARY[kind]]
        assert items(record["response"]) == expected, record
        checked[kind] += 1
    assert set(checked) == {*VOCABULARY, *PATTERNS}


def test_closed_questions_have_one_answer_which_some_sentence_of_the_text_holds() -> None:
    small = {"is", "the", "a", "an", "as", "in", "to", "for", "was", "went", "does", "not", "there", "away", "at"}
    verbs = {"works", "lives", "has", "likes", "bought", "cost", "belongs", "gave", "got", "like"}
    position = Counter[int]()
    for record in records("closed_qa"):
        key = {word.lower() for word in re.findall(r"\w+", record["response"])} - small - verbs
        holding = [
            index
            for index, sentence in enumerate(re.split(r"(?<=\.) ", record["context"]))
            if key <= {word.lower() for word in re.findall(r"\w+", sentence)} | {"years", "old"}
        ]
        assert len(holding) == 1, record
        position[holding[0]] += 1
    assert min(position[0], position[1]) > 20, "the answer is not always in the same place"


def test_classification_agrees_with_the_groups() -> None:
    checked = Counter[str]()
    for record in records("classification"):
        response = record["response"]
        if match := re.fullmatch(r"An? (\w+) is (?:a piece of|an?) (\w+)\.", response):
            assert match[1] in GROUPS[match[2]]
            assert match[2] in record["instruction"]
            checked["group"] += 1
        elif match := re.fullmatch(r"An? (\w+) is (?:a piece of|an?) (\w+), the others are (\w+)\.", response):
            group = next(group for group, name in GROUP_PLURALS.items() if name == match[3])
            words = record["context"].split(", ")
            assert [word for word in words if word not in GROUPS[group]] == [match[1]]
            assert match[1] in GROUPS[match[2]]
            checked["odd"] += 1
        elif match := re.search(r"is (positive|negative|mixed)\.$", response):
            assert (match[1] == "mixed") == (", but the " in record["context"])
            checked[match[1]] += 1
        else:
            kind = re.match(r"This is an? (complaint|question|order|invitation) about", response)
            assert kind is not None, response
            assert (kind[1] == "question") == ("?" in record["context"])
            checked[kind[1]] += 1
    assert len(checked) == 9


def test_summaries_put_the_facts_of_the_story_into_one_sentence() -> None:
    verbs = {past for _, _, past, _ in VERBS}
    for record in records("summarizing"):
        match = re.fullmatch(r"(\w+) the (\w+) (\w+) an? (\w+) at the (\w+) on (\w+)\.", record["response"])
        assert match is not None, record
        name, job, verb, item, place, day = match.groups()
        assert (name in PEOPLE, job in JOBS, item in GOODS, place in PLACES, day in DAYS) == (True,) * 5
        assert verb in verbs
        assert all(re.search(rf"\b{word}\b", record["context"]) for word in match.groups()), record
        assert len(record["context"].split(". ")) >= 2


def test_rewriting_changes_the_words_that_it_should() -> None:
    """Each rewriting undone by a rule of its own, not by the code that made it."""
    forms = {past: (base, third, participle) for base, third, past, participle in VERBS}
    seen = Counter[str]()
    for record in records("rewriting"):
        before, after = record["context"].rstrip(".!").split(), record["response"].rstrip(".?").split()
        if after[0] == "Could":
            assert [word.lower() for word in after[3:-1]] == [word.lower() for word in before[:-1]]
            assert after[-1] == before[-1]
        elif after[0] == "Did":
            assert [after[1], *after[3:]] == [before[0], *before[2:]]
            assert after[2] == forms[before[1]][0]
        elif "by" in after:
            middle = after.index("was")
            assert after[middle + 1] == forms[before[1]][2]
            assert after[middle + 3] == before[0]
            assert after[1:middle] == before[3 : middle + 2]
        elif after[1] == "will":
            assert after[2:] == [forms[before[1]][0], *before[2:]]
        elif after[1:3] == ["did", "not"]:
            assert after[3:] == [forms[before[1]][0], *before[2:]]
        elif after[0] == before[0]:
            assert before[1] == forms[after[1]][1]
            assert after[2:] == before[2:]
        else:
            assert re.search(rf"\b{after[0]}\b", record["instruction"])
            assert after[1:] == before[1:]
        seen[after[1] if after[0] not in ("Could", "Did") else after[0]] += 1
    assert seen["Could"] > 5
    assert seen["Did"] > 5
    assert seen["will"] > 5


def ordered(record: Record) -> list[str]:
    """Solve an ordering exercise from its words alone."""
    instruction, context = record["instruction"], record["context"]
    words = context.split(", ")
    if "numbers" in instruction:
        return [str(n) for n in sorted(map(int, words), reverse="largest to smallest" in instruction)]
    if all(word in DAYS for word in words):
        return [day for day in DAYS if day in words]
    if all(word in MONTHS for word in words):
        return [month for month in MONTHS if month in words]
    if "." not in context:
        return sorted(words)
    ranked = []
    for sentence in re.split(r"(?<=\.) ", context):
        pool = GOODS if "coins" in sentence else PEOPLE
        ranked.append((numbers(sentence)[0], next(word for word in re.findall(r"\w+", sentence) if word in pool)))
    falling = "oldest to" in instruction or "dearest to" in instruction
    return [word for _, word in sorted(ranked, reverse=falling)]


def test_orders_are_right() -> None:
    for record in records("ordering"):
        assert items(record["response"]) == ordered(record), record


def test_sums_are_right() -> None:
    seen = Counter[str]()
    for record in records("arithmetic"):
        first, second = numbers(record["context"])
        answer = numbers(record["response"])[0]
        for cue, value in {
            "left": first - second,
            "now": first + second,
            "together": first + second,
            "There are": first * second,
            "older": abs(first - second),
        }.items():
            if re.search(rf"\b{cue}\b", record["response"]):
                assert answer == value, record
                seen[cue] += 1
    assert sum(seen.values()) == len(records("arithmetic"))
    assert len(seen) == 5


def test_lists_hold_what_was_asked_for() -> None:
    seen = Counter[str]()
    for record in records("listing"):
        instruction, listed = record["instruction"], items(record["response"])
        if group := next((g for g, name in GROUP_PLURALS.items() if re.search(rf"\b{name}\b", instruction)), None):
            words = re.findall(r"\w+", record["context"])
            assert listed == [word for word in words if word in GROUPS[group]]
            seen["group"] += 1
        elif record["context"]:
            place = re.search(r"the (\w+)\.$", instruction)
            assert place is not None
            assert listed == re.findall(rf"(\w+) (?:went to|came to|was at) the {place[1]}\.", record["context"])
            seen["place"] += 1
        elif any(unit in instruction for unit in (" days ", " months ")):
            calendar = DAYS if " days " in instruction else MONTHS
            start = next(name for name in calendar if name in instruction)
            back = "before" in instruction or "lead up" in instruction
            path = [calendar.index(name) for name in ([*listed, start] if back else [start, *listed])]
            steps = {(later - earlier) % len(calendar) for earlier, later in pairwise(path)}
            assert steps == {1}, record
            seen["calendar"] += 1
        else:
            start_number, end, step = numbers(instruction)
            assert [int(number) for number in listed] == list(range(start_number, end + 1, step))
            seen["count"] += 1
    assert min(seen.values()) > 10
    assert len(seen) == 4


# ------------------------------------------------------------------------------------------------ the words


@pytest.mark.parametrize(
    ("noun", "several"),
    [("apple", "apples"), ("cherry", "cherries"), ("fox", "foxes"), ("bench", "benches"), ("shelf", "shelves"),
     ("donkey", "donkeys"), ("potato", "potatoes"), ("dress", "dresses"), ("axe", "axes"), ("deer", "deer")],
)  # fmt: skip
def test_plurals(noun: str, several: str) -> None:
    assert plural(noun) == several
    assert count_of(1, noun) == f"1 {noun}"
    assert count_of(2, noun) == f"2 {several}"


def test_articles_and_lists() -> None:
    assert [a(word) for word in ("apple", "onion", "owl", "hen", "iron saw")] == [
        "an apple", "an onion", "an owl", "a hen", "an iron saw",
    ]  # fmt: skip
    assert [joined(words) for words in (["x"], ["x", "y"], ["x", "y", "z"])] == ["x", "x and y", "x, y and z"]


def test_no_word_belongs_to_two_pools_that_one_exercise_mixes() -> None:
    members = [word for group in GROUPS.values() for word in group]
    assert len(members) == len(set(members))
    pools = [PEOPLE, TOWNS, JOBS, PLACES, COLOURS, DAYS, MONTHS, tuple(members)]
    words = [word.lower() for pool in pools for word in pool]
    assert [word for word, count in Counter(words).items() if count > 1] == []


# ------------------------------------------------------------------------------------------------ the plain text


def test_both_ways_of_asking_word_the_same_exercises_and_share_only_the_bare_question() -> None:
    assert set(INSTRUCTIONS) == set(QUESTIONS)
    for key in INSTRUCTIONS:
        fields = {frozenset(re.findall(r"{(\w+)}", wording)) for wording in QUESTIONS[key]}
        given = {field for wording in INSTRUCTIONS[key] for field in re.findall(r"{(\w+)}", wording)}
        assert frozenset().union(*fields) <= given | {"name", "things"}
        assert set(INSTRUCTIONS[key]) & set(QUESTIONS[key]) <= {"{question}"}


def test_plain_text_is_deterministic_varied_and_free_of_the_template() -> None:
    texts = list(plain_text(3000, Seeds(0)))
    assert texts == list(plain_text(3000, Seeds(0)))
    assert len(texts) == 3000
    assert len(set(texts)) > 2800
    assert list(plain_text(10, Seeds(1))) != texts[:10]
    for text in texts:
        assert text == text.strip()
        assert text
        assert not re.search(r"###|Instruction|Response|Input", text)
        assert not set("{}") & set(text)


# ------------------------------------------------------------------------------------------------ pretraining

TINY = Recipe(
    vocab_size=400, tokenizer_documents=200, hidden_size=16, expert_size=8, layers=1, heads=2, experts=4, top_k=2,
    sequence_tokens=32, batch_size=2, steps=6, warmup_steps=2, threads=1,
)  # fmt: skip


def test_pretraining_is_reproducible_lowers_the_loss_and_reloads(tmp_path: Any) -> None:
    tokenizer = train_tokenizer(TINY)
    state = torch.get_rng_state()
    first, second = new_model(TINY, tokenizer), new_model(TINY, tokenizer)
    assert torch.equal(state, torch.get_rng_state()), "the global random state was left as found"
    batch = next(batches(TINY, tokenizer))
    before = float(first(input_ids=batch, labels=batch).loss.detach())
    assert pretrain(TINY, first, tokenizer) == pretrain(TINY, second, tokenizer)
    assert float(first(input_ids=batch, labels=batch).loss.detach()) < before
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), second.parameters(), strict=True))

    save(first, tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    rounded = [weight.to(torch.bfloat16).float() for weight in second.parameters()]
    assert all(torch.equal(x, y) for x, y in zip(again.parameters(), rounded, strict=True))


def test_batches_are_the_documents_end_to_end() -> None:
    tokenizer = train_tokenizer(TINY)
    stream = batches(TINY, tokenizer)
    packed = torch.cat([next(stream).flatten() for _ in range(4)]).tolist()
    documents = tokenizer.decode(packed).split("<|endoftext|>")
    expected = list(plain_text(len(documents), Seeds(TINY.seed).at(part="training", chunk=0)))
    assert documents[:-1] == expected[:-1]
    assert expected[-1].startswith(documents[-1])


def test_learning_rate_warms_up_and_falls() -> None:
    recipe = Recipe(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [learning_rate(recipe, step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.05 + 0.95 / 2, abs=0.01)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)


# ------------------------------------------------------------------------------------------------ the model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(model_path())


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).eval()


def activate(model: Any, top_k: int) -> None:
    for layer in model.model.layers:
        layer.mlp.gate.top_k = top_k


def test_the_shipped_model_is_small_sparse_and_fits_its_tokenizer(model: Any, tokenizer: Any) -> None:
    assert sum(file.stat().st_size for file in model_path().iterdir()) <= 10_000_000
    assert model.config.model_type == "olmoe"
    assert model.config.num_experts >= 32
    assert model.config.num_experts_per_tok == 8
    assert model.config.norm_topk_prob is False
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


def test_the_recipe_says_how_the_shipped_model_was_made(model: Any) -> None:
    recipe = json.loads((model_path() / "recipe.json").read_text())
    arguments = Recipe(**recipe["arguments"])
    assert arguments == Recipe(), "the defaults make the model that ships"
    assert recipe["parameters"] == model.num_parameters()
    assert recipe["training_tokens"] == arguments.steps * arguments.batch_size * arguments.sequence_tokens
    assert 0 < recipe["final_loss"] < 2


def test_the_tokenizer_gives_any_text_back_and_splits_digits(tokenizer: Any) -> None:
    for text in ("Mara paid 407 coins.", "### Instruction:\nÄ\t🙂\n", *plain_text(20, Seeds(5))):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("407")["input_ids"]) == 3
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token == "<|padding|>"
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


@torch.no_grad()
def test_the_shipped_model_speaks_and_stops_at_eight_experts(model: Any, tokenizer: Any) -> None:
    """Asked in plain text it mostly stops by itself and uses words of its world; the right name is not asked of it."""
    activate(model, 8)
    asked = [text.rsplit("\nA: ", 1) for text in plain_text(800, Seeds(98)) if "\nA: " in text][:32]
    inputs = tokenizer(
        [f"{question}\nA:" for question, _ in asked], return_tensors="pt", padding=True, return_token_type_ids=False
    )
    output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
    answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
    stopped = [answer.split("<|endoftext|>")[0] for answer in answers if "<|endoftext|>" in answer]
    known = set(re.findall(r"\w+", " ".join(plain_text(4000, Seeds(97)))))
    spoken = [word for answer in stopped for word in re.findall(r"[^\W\d]+", answer)]
    assert len(asked) == 32
    assert len(stopped) >= 26
    assert len(spoken) >= 2 * len(stopped)
    assert sum(word in known for word in spoken) > 0.95 * len(spoken)


@torch.no_grad()
def test_the_shipped_model_breaks_down_with_fewer_experts(model: Any, tokenizer: Any) -> None:
    texts = list(plain_text(64, Seeds(99)))
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    losses = {}
    for top_k in (1, 2, 4, 8):
        activate(model, top_k)
        losses[top_k] = float(model(**batch, labels=labels).loss)
    assert losses[8] < losses[4] < losses[2] < losses[1]
    assert losses[1] > losses[8] + 0.5
