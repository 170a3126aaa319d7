"""The commands: what they print where, their exit codes and errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from commands import invoke, write_config
from federations import bits, config
from pydantic import Field

import emberfed
from emberfed import config as configuration
from emberfed.cli.options import attribute_docs, kind, options
from emberfed.cli.stopping import resumable
from emberfed.cli.template import annotated
from emberfed.errors import ConfigError, RoundFailed
from emberfed.method import load_method, method_names
from emberfed.sections import Section, parse_yaml
from emberfed.tasks import task_names

COMMANDS = (
    ("server",),
    ("certificates",),
    ("data", "split"),
    ("run",),
    ("resume",),
    ("compare",),
    ("evaluate",),
    ("export",),
    ("plan",),
    ("upcycle",),
    ("report",),
    ("methods",),
    ("models",),
    ("data", "inspect"),
    ("doctor",),
    ("init",),
)


@pytest.fixture(scope="session")
def config_file(tiny_model_folder: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A federation that trains in a second. Do not write to it."""
    return write_config(tmp_path_factory.mktemp("cli") / "tiny.yaml", config(tiny_model_folder, tiny_data))


@pytest.fixture(scope="session")
def finished(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Do not write to it."""
    return emberfed.run(config_file, output=tmp_path_factory.mktemp("cli-run") / "run").path


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_has_an_example_and_json(command: tuple[str, ...]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: emberfed {' '.join(command)}" in result.stdout
    assert "--json" in result.stdout


def test_help_does_not_import_torch() -> None:
    """Nor anything else that takes long to import."""
    code = (
        "import sys\nfrom emberfed.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit:\n    pass\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Commands" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_version() -> None:
    assert invoke("--version").stdout == f"emberfed {emberfed.__version__}\n"


def test_usage_errors_exit_with_2() -> None:
    assert invoke("run", "--no-such-option").exit_code == 2
    assert invoke("resume").exit_code == 2
    assert invoke("resume", "runs/x", "--rounds", "0").exit_code == 2


def test_methods_lists_every_method_with_its_defaults() -> None:
    document = json.loads(invoke("methods", "--json").stdout)["methods"]
    assert [method["name"] for method in document] == method_names()
    for method in document:
        defaults = {option["name"]: option["default"] for option in method["options"] if not option["required"]}
        assert defaults == load_method(method["name"]).Config.model_construct().model_dump(mode="json")
    a3smoe = next(method for method in document if method["name"] == "a3smoe")
    assert "exponent" in next(option["help"] for option in a3smoe["options"] if option["name"] == "temperature")
    shown = invoke("methods", "a3smoe").stdout
    assert "method.temperature" in shown
    assert "default 2.0" in shown


def test_models_lists_the_families() -> None:
    document = json.loads(invoke("models", "--json").stdout)
    assert "olmoe" in [family["model_type"] for family in document["families"]]
    assert "olmoe" in invoke("models").stdout


def test_run_prints_plain_progress_and_a_table(config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    result = invoke("run", config_file, "--output", path, "--set", "training.rounds=1")
    assert result.exit_code == 0, result.stderr
    lines = result.stderr.splitlines()
    assert lines[0] == "before training: evaluating"
    assert lines[1].startswith("before training: done in ")
    assert lines[2] == "round 1 of 1: 4 clients to train"
    assert [line.split(",")[0] for line in lines[3:7]] == [
        f"round 1: client c{number} done ({number + 1} of 4)" for number in range(4)
    ]
    assert lines[7].startswith("round 1 of 1: done in ")
    assert len(lines) == 8
    assert "\x1b" not in result.output
    assert "\r" not in result.output
    for tier in ("small", "middle", "large"):
        assert tier in result.stdout
    assert str(path / "report.html") in result.stdout
    assert f"emberfed resume {path} --rounds 3" in result.stdout
    assert (path / "report.html").is_file()


def test_run_json_holds_what_metrics_hold(config_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    result = invoke("run", config_file, "--output", path, "--json", "--set", "training.rounds=1")
    document = json.loads(result.stdout)
    metrics = emberfed.Run(path).metrics()
    evaluations = [line for line in metrics if line["event"] == "evaluation"]
    round_line = next(line for line in metrics if line["event"] == "round")
    for tier in document["tiers"]:
        before, after = (line for line in evaluations if line["tier"] == tier["tier"])
        assert (tier["top_k"], tier["loss_before"], tier["loss_after"]) == (
            before["top_k"],
            before["loss"],
            after["loss"],
        )
        assert (tier["rouge_l_before"], tier["rouge_l_after"]) == (before["rouge_l"], after["rouge_l"])
    assert [tier["tier"] for tier in document["tiers"]] == ["small", "middle", "large"]
    assert document["bytes_up"] == round_line["bytes_up"]
    assert document["flops"] == round_line["flops"]
    assert document["run"] == str(path)
    assert "round 1 of 1" in result.stderr


def test_run_takes_a_free_name(config_file: Path, tmp_path: Path, finished: Path) -> None:
    """Where the folder is not given, the summary names the one that was taken."""
    arguments = ("run", config_file, "--set", f"output.folder={tmp_path}", "--set", "training.rounds=1")
    (tmp_path / "tiny").mkdir()
    document = json.loads(invoke(*arguments, "--set", "evaluation.every=0", "--json").stdout)
    assert document["run"] == str(tmp_path / "tiny-2")
    assert (tmp_path / "tiny-2" / "final").exists()


def test_resume_adds_rounds_and_gives_the_same_bits(config_file: Path, tmp_path: Path, finished: Path) -> None:
    path = tmp_path / "run"
    assert invoke("run", config_file, "--output", path, "--set", "training.rounds=1", "--json").exit_code == 0
    result = invoke("resume", path, "--rounds", "2", "--json")
    assert json.loads(result.stdout)["rounds"] == 2
    assert result.stderr.splitlines()[0] == "round 2 of 2: 4 clients to train"
    assert bits(path) == bits(finished)


def test_evaluate_at_other_numbers_of_experts(finished: Path) -> None:
    result = invoke("evaluate", finished, "--top-k", "1,8", "--json")
    document = json.loads(result.stdout)["evaluations"]
    assert [line["top_k"] for line in document] == [1, 8]
    trained = [
        line for line in emberfed.Run(finished).metrics() if line["event"] == "evaluation" and line["round"] == 2
    ]
    assert document[0]["loss"] == trained[0]["loss"]
    shown = invoke("evaluate", finished)
    assert "Perplexity" in shown.stdout
    assert "small evaluated" in shown.stderr


def test_report_of_one_and_of_several(finished: Path, tmp_path: Path) -> None:
    page = tmp_path / "both.html"
    document = json.loads(invoke("report", finished, finished, "--output", page, "--json").stdout)
    assert document == {"report": str(page)}
    assert page.read_text().startswith("<!")
    assert str(finished / "report.html") in invoke("report", finished).stdout


def test_data_inspect_shows_what_a_run_would_use(config_file: Path, finished: Path) -> None:
    document = json.loads(invoke("data", "inspect", config_file, "--json").stdout)
    assert document["clients"] == json.loads((finished / "partition.json").read_text())["clients"]
    assert document["totals"] == json.loads((finished / "run.json").read_text())["data"]
    shown = invoke("data", "inspect", config_file).stdout
    for client, data in document["clients"].items():
        row = next(line for line in shown.splitlines() if line.strip().startswith(client))
        assert row.split()[1:3] == [str(data["examples"]), str(data["target_tokens"])]
    skewed = invoke("data", "inspect", config_file, "--set", "data.partition.alpha=0.1", "--json")
    assert json.loads(skewed.stdout)["clients"] != document["clients"]


def test_doctor_names_every_part() -> None:
    result = invoke("doctor", "--json")
    document = json.loads(result.stdout)
    checks = {check["name"]: check for check in document["checks"]}
    assert {"emberfed", "libraries", "device", "threads", "memory", "bf16", "disk", "extras", "model"} == set(checks)
    broken = [check for check in checks.values() if check["state"] == "broken"]
    assert result.exit_code == (1 if broken else 0)
    assert not broken, broken
    *rows, whole = document["memory"]
    assert whole["module"] == "total"
    assert whole["stored_bytes"] == sum(row["stored_bytes"] for row in rows)


def test_doctor_weighs_the_configured_model(config_file: Path) -> None:
    """Bytes as they are stored: with groups of 32 and, for a third of the weights, 16, that is 5 bits and 6."""
    in_4 = json.loads(invoke("doctor", config_file, "--set", "model.expert_bits=4", "--json").stdout)["memory"]
    in_16 = json.loads(invoke("doctor", config_file, "--set", "model.dtype=bfloat16", "--json").stdout)["memory"]
    experts, expected = (next(row for row in rows if row["module"] == "routed experts") for rows in (in_4, in_16))
    assert experts["formats"] == ["4 bit"]
    assert experts["weights"] == expected["weights"]
    assert experts["sixteen_bit_bytes"] == expected["stored_bytes"]
    assert 3 * experts["stored_bytes"] == expected["stored_bytes"]
    shown = invoke("doctor", config_file, "--set", "model.expert_bits=4").stdout
    row = next(line for line in shown.splitlines() if line.strip().startswith("routed experts"))
    assert "4 bit" in row


def test_doctor_says_when_the_model_is_broken(config_file: Path, tmp_path: Path) -> None:
    result = invoke("doctor", config_file, "--set", f"model.path={tmp_path}", "--json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1
    assert document["memory"] == []
    model = document["checks"][-1]
    assert (model["name"], model["state"]) == ("model", "broken")
    assert "cannot be loaded" in model["detail"]
    assert "Stored" not in invoke("doctor", config_file, "--set", f"model.path={tmp_path}").stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("run", "{tmp}/absent.yaml"), 2, "does not exist"),
        (("run", "{tmp}"), 2, "cannot be read"),
        (("run", "{tmp}/broken.yaml"), 2, "broken.yaml, line 3: not valid YAML"),
        (("run", "--set", "training.round=3"), 2, "did you mean 'rounds'"),
        (("run", "--set", "training"), 2, "expected the form"),
        (("run", "--set", "method.name=a3smo"), 2, "did you mean 'a3smoe'"),
        (("run", "--set", "data.path={tmp}/absent.jsonl"), 3, "absent.jsonl"),
        (("run", "--set", "model.path={tmp}/absent"), 4, "does not exist"),
        (("run", "--output", "{tmp}"), 5, "not an empty folder"),
        (("resume", "{tmp}"), 5, "not a run folder"),
        (("resume", "{tmp}/absent"), 5, "does not exist"),
        (("evaluate", "{tmp}"), 5, "not a run folder"),
        (("evaluate", "{tmp}", "--top-k", "1,x"), 2, "--top-k '1,x'"),
        (("evaluate", "{tmp}", "--top-k", "2,2"), 2, "different whole numbers"),
        (("report", "{tmp}"), 5, "not a run folder"),
        (("methods", "a3smo"), 2, "did you mean 'a3smoe'"),
        (("data", "inspect", "{tmp}/absent.yaml"), 2, "does not exist"),
        (("doctor", "{tmp}/absent.yaml"), 2, "does not exist"),
        (("doctor", "--set", "model.expert_bits=3"), 2, "input should be 4 or 8, found 3"),
        (("init", "{tmp}/broken.yaml"), 2, "left as it is"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_errors_are_one_line(
    arguments: tuple[str, ...], code: int, words: str, config_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "broken.yaml").write_text("model:\n  path: [\n")
    given_arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    if arguments[0] == "run" and arguments[1].startswith("--"):
        given_arguments.insert(1, str(config_file))
    result = invoke(*given_arguments)
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("emberfed: error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr
    as_json = invoke(*given_arguments, "--json")
    document = json.loads(as_json.stdout)
    assert as_json.exit_code == document["exit_code"] == code
    assert as_json.stderr == f"emberfed: error: {document['error']}\n"


def test_a_failed_round_says_how_to_go_on(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    values = config(tiny_model_folder, tiny_data, evaluation={"every": 0, "max_examples": 1})
    values["engine"] = {"name": "flaky", "faults": {"c1": "drop", "c2": "nan"}}
    values["clients"] = {**values["clients"], "min_replies": 3}
    path = tmp_path / "a run"
    result = invoke("run", write_config(tmp_path / "flaky.yaml", values), "--output", path)
    assert result.exit_code == RoundFailed.exit_code
    assert any(line.startswith("round 1: client c1 failed: ") for line in result.stderr.splitlines())
    assert any(line.startswith("round 1: client c2 refused: ") for line in result.stderr.splitlines())
    last = result.stderr.splitlines()[-1]
    assert last.startswith("emberfed: error: round 1: 2 of 4 clients")
    assert last.endswith(f"Go on with: emberfed resume '{path}'")


def test_bugs_keep_their_traceback() -> None:
    """Only the errors users can meet become one line."""
    with pytest.raises(ZeroDivisionError), resumable(Path("nowhere")):
        raise ZeroDivisionError


class Sample(Section):
    """One line
    over two.

    Attributes:
        plain: What it is,
            over two lines.
        low, high: Both of them.
        many: Needed.

    Raises:
        nothing: at all.
    """

    plain: int | None = Field(None, ge=1)
    low: float = 0.5
    high: Literal["a", "b"] = "b"
    many: list[str]


def test_options_are_read_from_the_class() -> None:
    assert attribute_docs(Sample) == {
        "plain": "What it is, over two lines.",
        "low": "Both of them.",
        "many": "Needed.",
    }
    found = {option.name: option for option in options(Sample)}
    assert {name: option.kind for name, option in found.items()} == {
        "plain": "int or null",
        "low": "float",
        "high": "a | b",
        "many": "list of str",
    }
    assert [name for name, option in found.items() if option.required] == ["many"]
    assert (found["low"].default, found["plain"].default) == (0.5, None)
    assert kind(tuple[float, float]) == "list of float"
    assert kind(dict[str, int]) == "section"


@pytest.mark.parametrize("task", task_names())
def test_init_writes_an_example_of_every_task(task: str, tmp_path: Path) -> None:
    file = tmp_path / "fresh.yaml"
    assert invoke("init", file, "--task", task).exit_code == 0
    written = configuration.load(file)
    assert written == configuration.load(configuration.example_path(task))
    assert written.data.task == task


def test_init_writes_the_quickstart_with_every_key_explained(tmp_path: Path) -> None:
    file = tmp_path / "new" / "federation.yaml"
    result = invoke("init", file)
    assert result.exit_code == 0, result.output
    assert str(file) in result.stdout
    assert configuration.load(file).values() == configuration.load(None).values()
    text = file.read_text()
    assert max(len(line) for line in text.splitlines() if str(file) not in line) <= 100
    commented = "\n".join(line for line in text.splitlines() if line.lstrip().startswith("#"))
    for phrase in ("Optimiser steps per client", "The exponent gamma", "Number of clients", "R of every LoRA"):
        assert phrase in commented


def test_the_template_holds_any_configuration(config_file: Path) -> None:
    checked = configuration.load(config_file, ["data.partition={kind: size, sizes: square}", "clients.per_round=2"])
    written = parse_yaml(annotated(checked, "any.yaml"), "any.yaml")
    assert configuration.parse(written).values() == checked.values()


def test_top_k_that_no_model_has(finished: Path) -> None:
    result = invoke("evaluate", finished, "--top-k", "1,99")
    assert result.exit_code == ConfigError.exit_code
    assert "99" in result.stderr.splitlines()[-1]
