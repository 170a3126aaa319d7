"""The report page: what it shows is what the run folder holds, and nothing else reaches the page."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from builders import save_tiny_family
from federations import config as federation
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colormaps, image
from run_folder_example import CATEGORIES, TIERS, read_lines, write_json, write_lines, write_run

import emberfed
from emberfed.errors import RunFolderError, StorageError
from emberfed.report import numbers, write_report
from emberfed.report.markup import Html, tag
from emberfed.report.page import summary
from emberfed.report.picture import write_picture
from emberfed.report.reading import read_run
from emberfed.report.views import natural_order, run_labels, tiers_of

_VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """A parsed page; fails on tags that do not close in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._texts: list[str] = []
        self._open: list[str] = []
        self._row: list[str] = []
        self._table = ""
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))
        if name not in _VOID:
            self._open.append(name)
        if name == "table":
            self._table = str(dict(attrs)["aria-label"])
            self.tables[self._table] = []
        elif name == "tr":
            self.tables[self._table].append([])
        elif name in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_startendtag(self, name: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((name, dict(attrs)))

    def handle_endtag(self, name: str) -> None:
        assert self._open.pop() == name

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] == "style":
            return
        self._texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[self._table][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join("".join(self._texts).split())

    @property
    def drawings(self) -> list[str]:
        """What every drawing says it shows."""
        return [str(attrs["aria-label"]) for name, attrs in self.elements if name == "svg"]


def report(runs: Sequence[Path], output: Path) -> Page:
    return Page(write_report(runs, output / "report.html").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    return text.replace(numbers.SPACE, " ")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests that change one make their own."""
    return write_run(tmp_path_factory.mktemp("runs") / "finished")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is quick to draw, with a client in every tier."""
    return write_run(tmp_path_factory.mktemp("runs") / "small", clients=4, rounds=1, layers=1, experts=8)


@pytest.fixture(scope="module")
def page(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report([run], tmp_path_factory.mktemp("page"))


def test_page_is_self_contained(page: Page) -> None:
    fetching = ("src", "srcset", "href", "xlink:href", "data", "poster", "action")
    addresses = [attrs[key] or "" for _, attrs in page.elements for key in fetching if key in attrs]
    foreign = [address for address in addresses if not address.startswith(("#", "data:image/png;base64,"))]
    assert foreign == ["https://arxiv.org/abs/2600.00001"]
    assert not {"script", "link", "iframe", "img", "object"} & {name for name, _ in page.elements}
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_every_drawing_is_described_and_takes_the_pages_colours(page: Page) -> None:
    drawings = [attrs for name, attrs in page.elements if name == "svg"]
    assert len(drawings) == 2 + 4 + 4 + 1 + 4 + 2 + 1 + 3
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert "#0102" not in page.source
    assert "DejaVu" not in page.source
    assert {"currentColor", "var(--rule)", "var(--paper)", "var(--series-1)"} <= set(
        re.findall(r"(?:fill|stroke): ([^;\"]+)", page.source)
    )


def test_ids_are_unique_and_references_resolve(small_run: Path, tmp_path: Path) -> None:
    page = report([small_run, small_run], tmp_path)
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    links = [attrs[key] or "" for _, attrs in page.elements for key in ("href", "xlink:href") if key in attrs]
    targets = {link[1:] for link in links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.source))
    assert targets <= set(ids)
    assert len(targets) > 20


def test_quality_table_shows_the_input(run: Path, page: Page) -> None:
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "evaluation"]
    head, *rows = page.tables["Quality of the global model by tier and round"]
    assert head == ["Metric", "Tier", "Before training", "Round 1", "Round 2", "Round 3", "Change", "Examples"]
    assert len(rows) == 3 * len(TIERS)
    for metric, tier, *cells in rows:
        key = {"ROUGE-L": "rouge_l", "Loss": "loss", "Perplexity": "perplexity"}[metric]
        values = [line[key] for line in lines if plain(tier) == f"{line['tier']} (K = {line['top_k']})"]
        assert cells[:4] == [f"{value:.3f}" for value in values]
        assert float(cells[4].replace("−", "-")) == pytest.approx(values[3] - values[0], abs=6e-4)
        assert cells[5] == "80"


def test_category_table_shows_first_and_last(run: Path, page: Page) -> None:
    lines = [line for line in read_lines(run / "metrics.jsonl") if line["event"] == "evaluation"]
    _, *rows = page.tables["ROUGE-L by category, from the first evaluation to the last"]
    assert [row[0] for row in rows] == sorted(CATEGORIES)
    for name, examples, *cells in rows:
        assert examples == "10"
        for (tier, _), cell in zip(TIERS, cells, strict=True):
            scores = [line["categories"][name]["rouge_l"] for line in lines if line["tier"] == tier]
            assert cell == f"{scores[0]:.3f} → {scores[-1]:.3f}"


def test_cost_tables_show_the_input(run: Path, page: Page) -> None:
    first = next(line for line in read_lines(run / "metrics.jsonl") if line["event"] == "round")
    head, *rows = page.tables["Costs by round"]
    shown = dict(zip(head, map(plain, rows[0]), strict=True))
    assert shown["Time"] == f"{first['seconds']:.1f} s"
    assert shown["Everything else"] == f"0.80 s ({100 * 0.8 / first['seconds']:.1f} %)"
    assert shown["Computation"] == f"{first['flops'] / 1e9:.0f} GFLOP"
    assert shown["Sent by clients"] == f"{first['bytes_up'] / 1e6:.1f} MB"
    assert (shown["Peak memory"], shown["Replied"], shown["Failed"]) == ("416 MB", "8", "0")
    assert dict(zip(head, rows[1], strict=True))["Failed"] == "1"
    assert dict(zip(head, rows[-1], strict=True))["Replied"] == "23"
    head, *rows = page.tables["Costs of one client in one round, mean by tier"]
    clients = [line for line in read_lines(run / "clients.jsonl") if line["tier"] == "tablet"]
    shown = dict(zip(head, map(plain, rows[1]), strict=True))
    assert (shown["Tier"], shown["Clients"], shown["Replies"]) == ("tablet (K = 2)", "2", str(len(clients)))
    assert shown["Computation"] == f"{sum(line['flops'] for line in clients) / len(clients) / 1e9:.1f} GFLOP"


def test_figures_tell_the_input(run: Path, page: Page) -> None:
    clients = read_lines(run / "clients.jsonl")
    losses = [loss for line in clients if (line["round"], line["tier"]) == (1, "phone") for _, loss in line["losses"]]
    told = next(text for text in page.drawings if text.startswith("Training loss of the clients of phone"))
    assert f"round 1: {sum(losses) / len(losses):.3f}" in told
    shards = json.loads((run / "partition.json").read_text())["clients"]
    told = next(text for text in page.drawings if text.startswith("Bars of examples by client"))
    assert all(f"{name} {shard['examples']}" in told for name, shard in shards.items())


def test_failures_events_and_configuration_are_shown(run: Path, page: Page) -> None:
    assert page.tables["Clients whose work was not used"][1] == ["2", "failed", "c3", "non-finite loss at step 4"]
    assert page.tables["Events"][2] == ["2026-01-05T10:01:12Z", "warning", "client c3 failed in round 2"]
    assert " ".join((run / "config.yaml").read_text().split()) in page.text
    assert ["memory_bytes", "8000000000"] in page.tables["Hardware"]
    assert ["git commit", "0123456789abcdef"] in page.tables["Versions"]
    assert "incomplete" not in page.text


def test_heat_map_pixels_are_the_shares(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=2, layers=1, experts=4)
    counts = {"c0": [0, 10, 30, 60], "c1": [50, 50, 0, 0]}
    lines = [line | {"activation_counts": [counts[line["client"]]]} for line in read_lines(folder / "clients.jsonl")]
    # The smaller budget comes first whatever the order of the file.
    write_lines(folder / "clients.jsonl", reversed(lines))
    page = report([folder], tmp_path)
    drawing = page.source[page.source.index('aria-label="Heat map of layer 0') :]
    encoded = re.search(r"data:image/png;base64,([^\"]+)", drawing)
    assert encoded
    pixels = image.imread(io.BytesIO(base64.b64decode(encoded[1])))
    shares = np.array([[0, 0.1, 0.3, 0.6], [0.5, 0.5, 0, 0]])
    expected = colormaps["Blues"](np.sqrt(shares) / math.sqrt(0.6))
    np.testing.assert_allclose(pixels, expected, atol=1.5 / 255)
    assert "Most used is expert 1, with 30.0 % of the activations" in plain(page.drawings[-7])


def test_summary_is_honest_in_both_directions(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=2)
    scores = {("phone", 0): 0.06, ("phone", 2): 0.21, ("workstation", 0): 0.4, ("workstation", 2): 0.31}
    scores |= {("tablet", 0): 0.2, ("tablet", 2): 0.2}
    lines = read_lines(folder / "metrics.jsonl")
    for line in lines:
        if (key := (line.get("tier"), line["round"])) in scores:
            line["rouge_l"] = scores[key]
    write_lines(folder / "metrics.jsonl", lines)
    told = plain(summary(read_run(folder)))
    assert "A³SMoE fine-tunes the model builtin (4.65 M parameters, 4 layers of 32 experts, 8 active natively)" in told
    assert "on 8 clients in 4 tiers. All 2 rounds done." in told
    assert "At K = 1 (phone) ROUGE-L rose from 0.060 to 0.210 in 2 rounds." in told
    assert "At K = 2 (tablet) ROUGE-L stayed at 0.200 in 2 rounds." in told
    assert "At K = 8 (workstation) ROUGE-L fell from 0.400 to 0.310 in 2 rounds." in told


def _nasty(value: Any, replace: Callable[[str], str]) -> Any:
    """Return `value` with every string in it, keys of free text included, replaced."""
    if isinstance(value, dict):
        return {
            (replace(key) if key in {"c0", *CATEGORIES} else key): _nasty(item, replace) for key, item in value.items()
        }
    if isinstance(value, list):
        return [_nasty(item, replace) for item in value]
    return replace(value) if isinstance(value, str) and value not in ("evaluation", "round") else value


@pytest.mark.parametrize(
    "attack",
    [
        "<script>alert(1)</script>",
        "\"><img src=x onerror='alert(1)'>",
        '</text></svg><b id="x">&amp;',
        "</title></style><b>",
        "javascript:alert(1)",
        '$\\frac{x}$ _id="y" fill: #010203',
        "_漢字\x00\x1b\ud800 ",
    ],
)
def test_no_text_becomes_markup(attack: str, small_run: Path, page: Page, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.jsonl", "clients.jsonl", "events.jsonl"):
        write_lines(folder / name, [_nasty(line, lambda text: attack + text) for line in read_lines(small_run / name)])
    for name in ("partition.json", "run.json"):
        write_json(folder / name, _nasty(json.loads((small_run / name).read_text()), lambda text: attack + text))
    (folder / "config.yaml").write_text(f"name: {attack}\n", encoding="utf-8", errors="replace")
    attacked = report([folder], tmp_path)
    assert {name for name, _ in attacked.elements} <= {"aside"} | {name for name, _ in page.elements}
    assert {key for _, attrs in attacked.elements for key in attrs} <= {
        key for _, attrs in page.elements for key in attrs
    }
    assert not [attrs for name, attrs in attacked.elements if name == "a"]
    shown = re.sub(r"[\x00-\x1f\ud800]", "\N{REPLACEMENT CHARACTER}", attack)
    assert f"{shown}client c3 failed in round 2" in "".join(attacked.tables["Events"][2])
    assert attacked.text.count(" ".join(shown.split())) > 50


def test_same_run_same_bytes_and_no_global_state(small_run: Path, tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    first = write_report([small_run], tmp_path / "one" / "report.html").read_bytes()
    second = write_report([small_run], tmp_path / "two" / "report.html").read_bytes()
    assert first == second
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        ("config.yaml", "config.yaml is missing."),
        ("run.json", "run.json is missing."),
        ("metrics.jsonl", "No evaluation has been recorded yet."),
        ("clients.jsonl", "No client has reported local training yet."),
        ("partition.json", "How the data was divided is not recorded."),
        ("events.jsonl", "No events were recorded."),
    ],
)
def test_page_without_one_file_says_so(missing: str, told: str, small_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for path in small_run.iterdir():
        if path.name != missing:
            (folder / path.name).write_bytes(path.read_bytes())
    page = report([folder], tmp_path)
    assert told in page.text
    assert (f"{missing} is missing." in page.text) == (missing != "events.jsonl")
    assert len(page.drawings) > 4


def test_run_that_has_only_begun(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("training: {rounds: 3}\n")
    page = report([tmp_path / "run"], tmp_path)
    assert "0 of 3 rounds done: the run is in progress or was stopped." in page.text
    assert "No round has ended yet." in page.text
    assert page.drawings == []


def test_run_before_its_first_round(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    lines = [line for line in read_lines(folder / "metrics.jsonl") if line["round"] == 0]
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(folder / "clients.jsonl", [])
    page = report([folder], tmp_path)
    assert f"At K = 1 (phone) ROUGE-L is {lines[0]['rouge_l']:.3f} before training." in plain(page.text)
    assert page.tables["Quality of the global model by tier and round"][1][3] == "–"


def test_damaged_lines_are_skipped_with_a_notice(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole[:-20])
    with (folder / "clients.jsonl").open("a") as file:
        file.write('{"round": "one", "client": "c0", "top_k": 1}\n[1, 2]\n')
    (folder / "partition.json").write_text('{"clients": {"c0": 3}}')
    page = report([folder], tmp_path)
    last = len(whole.splitlines())
    assert f"metrics.jsonl, line {last} is damaged (not a JSON object) and was skipped." in page.text
    assert "clients.jsonl, line 24 was skipped: round: input should be a valid integer" in page.text
    assert "clients.jsonl, line 25 is damaged" in page.text
    assert "partition.json was left out: clients.c0:" in page.text
    rows = page.tables["Quality of the global model by tier and round"]
    assert rows[4][5] == "–"  # workstation, ROUGE-L, round 3
    assert rows[3][5] != "–"


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reading_a_file_cut_anywhere_keeps_every_whole_line(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    whole = b'{"round": 0, "event": "evaluation", "top_k": 1, "rouge_l": 0.25}\n' * 3
    cut = data.draw(st.integers(0, len(whole)))
    (folder / "metrics.jsonl").write_bytes(whole[:cut].replace(b'"top_k": 1', b'"top_k": 2', 1))
    (folder / "run.json").write_bytes(b'{"name": "quickstart"}'[: data.draw(st.integers(0, 22))])
    run = read_run(folder)
    line = len(whole) // 3
    # The line is whole from its last brace on; the newline adds nothing. The second and third have the same key.
    expected = min(2, (cut + 1) // line)
    assert len(run.evaluations) == expected
    assert any(notice.startswith("metrics.jsonl") for notice in run.notices) == (cut % line not in (0, line - 1))


def test_a_round_run_again_counts_once(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    for name in ("metrics.jsonl", "clients.jsonl"):
        lines = read_lines(folder / name)
        write_lines(folder / name, [*({**line, "seconds": 1e6} for line in lines), *lines])
    again = read_run(folder)
    assert (len(again.evaluations), len(again.rounds), len(again.clients)) == (8, 1, 8)
    assert all(line.seconds < 1e3 for line in again.rounds)
    assert all(line.seconds < 1e3 for line in again.clients)


def test_values_that_are_not_numbers_are_dashes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1, layers=1)
    lines = read_lines(folder / "metrics.jsonl")
    lines[0] |= {"rouge_l": None, "loss": math.nan, "perplexity": math.inf}
    write_lines(folder / "metrics.jsonl", lines)
    write_lines(
        folder / "clients.jsonl", [line | {"losses": [[1, None]]} for line in read_lines(folder / "clients.jsonl")]
    )
    page = report([folder], tmp_path)
    rows = page.tables["Quality of the global model by tier and round"]
    assert [rows[1][2], rows[5][2], rows[9][2]] == ["–", "–", "∞"]
    assert rows[1][4] == "–"


def test_several_runs_are_compared_first(small_run: Path, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", clients=2, rounds=2, layers=1, seed=7)
    page = report([small_run, other], tmp_path)
    head, first, second = page.tables["Runs side by side: last ROUGE-L and its change"]
    assert next(iter(page.tables)) == "Runs side by side: last ROUGE-L and its change"
    assert [first[0], second[0]] == ["quickstart (small)", "quickstart (other)"]
    assert [first[2], second[2]] == ["1", "7"]
    for folder, row in ((small_run, first), (other, second)):
        scores = [
            line["rouge_l"]
            for line in read_lines(folder / "metrics.jsonl")
            if line["event"] == "evaluation" and line["tier"] == "laptop"
        ]
        shown = row[[plain(text) for text in head].index("ROUGE-L, laptop (K = 4)")]
        assert shown == f"{scores[-1]:.3f} (+{scores[-1] - scores[0]:.3f})"
    headings = [name for name, _ in page.elements if name in ("h1", "h2", "h3")]
    assert headings == ["h1", *["h2", *["h3"] * 7] * 2]


def test_run_labels_are_distinct(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "a" / "run")
    twin = write_run(tmp_path / "b" / "run")
    runs = [read_run(path) for path in (folder, twin, folder)]
    assert run_labels(runs) == ("quickstart (run) · 1", "quickstart (run) · 2", "quickstart (run) · 3")
    assert run_labels(runs[:1]) == ("quickstart",)


def test_many_of_everything(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=70, rounds=14, layers=2, experts=8)
    lines = [line for line in read_lines(folder / "clients.jsonl") if line["round"] == 14]
    write_lines(folder / "clients.jsonl", lines)
    labels = {f"label {number}": 1 + number for number in range(20)}
    partition = {"kind": "by label", "clients": {f"c{place}": {"labels": labels} for place in range(70)}}
    write_json(folder / "partition.json", partition)
    page = report([folder], tmp_path)
    head = page.tables["Quality of the global model by tier and round (one evaluation in 2, and the last)"][0]
    assert (head[2], head[3], head[-3]) == ("Before training", "Round 2", "Round 14")
    assert "13 other labels" in page.text
    assert "Heat map of layer 1: 70 clients by 8 experts." in " ".join(page.drawings)


def test_tiers_are_ordered_by_budget(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    info = json.loads((folder / "run.json").read_text())
    write_json(folder / "run.json", info | {"tiers": info["tiers"][::-1]})
    extra = {"round": 1, "event": "evaluation", "top_k": 3, "rouge_l": 0.2}
    write_lines(folder / "metrics.jsonl", [extra, *read_lines(folder / "metrics.jsonl")])
    labels = [plain(tier.label) for tier in tiers_of(read_run(folder))]
    assert labels == ["phone (K = 1)", "tablet (K = 2)", "K = 3", "laptop (K = 4)", "workstation (K = 8)"]


def test_natural_order() -> None:
    assert sorted(["c10", "c2", "b", "c", "2", "10"], key=natural_order) == ["2", "10", "b", "c", "c2", "c10"]


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"absent is not a folder"):
        write_report([tmp_path / "absent"], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match=r"is not a run folder: expected one of config\.yaml"):
        write_report([tmp_path], tmp_path / "report.html")
    with pytest.raises(RunFolderError, match="no run folder was given"):
        write_report([], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_cannot_be_written_leaves_nothing(run: Path, tmp_path: Path) -> None:
    (tmp_path / "report.html").mkdir()
    with pytest.raises(StorageError, match=r"could not write .*report\.html"):
        write_report([run], tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_the_report_leaves_the_run_alone(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", clients=2, rounds=1, layers=1)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    write_report([folder], folder / "report.html")
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert set(after) == {*before, "report.html"}
    assert before.items() <= after.items()


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (numbers.byte_size(0), "0 B"),
        (numbers.byte_size(999), "999 B"),
        (numbers.byte_size(1_000), "1.00 kB"),
        (numbers.byte_size(12_345_678), "12.3 MB"),
        (numbers.byte_size(999_950_000), "1.00 GB"),
        (numbers.flops(4.56e12), "4.56 TFLOP"),
        (numbers.flops(7.2e20), "720 EFLOP"),
        (numbers.parameters(6.9e9), "6.90 B"),
        (numbers.seconds(0.42), "0.42 s"),
        (numbers.seconds(9.999), "10.0 s"),
        (numbers.seconds(59.96), "1 min 00 s"),
        (numbers.seconds(150), "2 min 30 s"),
        (numbers.seconds(3_900), "1 h 05 min"),
        (numbers.share(0.93), "93.0 %"),
        (numbers.count(12_345), "12,345"),
        (numbers.count(None), "–"),
        (numbers.score(0.2064), "0.206"),
        (numbers.score(math.nan), "–"),
        (numbers.score(math.inf), "∞"),
        (numbers.byte_size(math.nan), "–"),
        (numbers.change(0.3, 0.288), "−0.012"),
        (numbers.change(0.06, 0.21), "+0.150"),
        (numbers.change(0.2, 0.2001), "±0.000"),
        (numbers.change(math.nan, 0.2), "–"),
    ],
)
def test_numbers_as_people_read_them(shown: str, expected: str) -> None:
    assert plain(shown) == expected


@given(st.floats(1, 1e17))
def test_byte_sizes_keep_three_digits(value: float) -> None:
    digits, unit = plain(numbers.byte_size(value)).replace(",", "").split(" ")
    power = ["B", "kB", "MB", "GB", "TB", "PB"].index(unit)
    assert float(digits) * 1000.0**power == pytest.approx(value, rel=0.0051 if power else 0.51)


@given(st.text(), st.text())
def test_markup_holds_any_text(text: str, attribute: str) -> None:
    parser = Page(tag("p", text, title=attribute))
    clean = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", attribute)
    assert parser.elements == [("p", {"title": clean})]
    assert tag("p", Html("<b>x</b>")) == "<p><b>x</b></p>"


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_picture_is_the_same_each_time(suffix: str, run: Path, tmp_path: Path) -> None:
    first = write_picture(run, tmp_path / f"one{suffix}").read_bytes()
    assert first == write_picture(run, tmp_path / f"two{suffix}").read_bytes()
    assert first.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_picture_is_on_white_with_a_bar_as_high_as_the_score(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", rounds=1)
    lines = read_lines(folder / "metrics.jsonl")
    heights = {"phone": 0.25, "tablet": 0.5, "laptop": 0.5, "workstation": 0.5}
    write_lines(folder / "metrics.jsonl", [line | {"rouge_l": heights.get(line.get("tier", ""), 0)} for line in lines])
    pixels = image.imread(write_picture(folder, tmp_path / "picture.png"))
    assert pixels.shape[:2] == (800, 2000)
    np.testing.assert_array_equal(pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3], 1.0)
    left = pixels[:, :1000, :3]
    phone, tablet = (
        np.all(np.abs(left - np.array(colour) / 255) < 0.01, axis=2).sum(axis=0).max()
        for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00))
    )
    assert phone / tablet == pytest.approx(0.5, abs=0.01)


def test_picture_refuses_what_it_cannot_draw(run: Path, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"written as \.png or \.svg, not as '\.jpg'"):
        write_picture(run, tmp_path / "picture.jpg")
    folder = tmp_path / "begun"
    folder.mkdir()
    (folder / "config.yaml").write_text("{}")
    with pytest.raises(RunFolderError, match="has no evaluation to draw yet"):
        write_picture(folder, tmp_path / "picture.png")
    assert list(tmp_path.glob("picture*")) == []


def test_a_dense_models_run_is_whole(tmp_path: Path, tiny_data: Path) -> None:
    """A dense model counts no activations: null there is not damage, and costs are still told."""
    tiers = [{"name": "all", "share": 1.0, "top_k": 1, "rank": 2}]
    values = federation(
        save_tiny_family("llama", tmp_path / "model"),
        tiny_data,
        method={"name": "flexlora"},
        clients={"tiers": tiers},
        training={"rounds": 1},
        evaluation={"max_examples": 2},
    )
    run = emberfed.run(values, output=tmp_path / "run")
    page = (run.path / "report.html").read_text()
    assert "damaged" not in page
    assert "No client has reported" not in page
