"""Deployments whose clients, networks or keepers go wrong: what is refused, in which words, and that the rest goes on.

What ends before a server or client has anything to do is tried in this process; the others are processes of their own.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from commands import invoke, write_config
from deployments import ENVIRONMENT, Grounds, free_port, grounds, here, lines
from federations import bits, config
from test_deployment import of_three
from test_flower_certificates import listening, reissue
from test_flower_node import Federation, client, until
from transformers import AutoTokenizer

import emberfed
from emberfed import assembly, deployment
from emberfed.config import RunConfig, parse
from emberfed.deployment import Enrolled, Roll
from emberfed.errors import ConfigError, DataError, EngineError, RunFolderError
from emberfed.events import ignore
from emberfed.flower import certificates
from emberfed.flower.link import DeploymentConfig, open_link

QUICK = ("--set", "engine.poll_seconds=0.05")
GOOD, BAD = ("c0", "c3"), ("c1", "c2", "c4")
FAULTS: Mapping[str, Mapping[str, str]] = {
    "c1": {"nan": "values are not finite", "foreign": "foreign tensor", "shape": "expected"},
    "c2": {"weight": "'examples' must be", "garbage": "not a bundle of tensors", "old_round": "belongs to round"},
    "c4": {
        "foreign-message": "without emberfed's record",
        "measured": "it measured examples, peak_memory_bytes, seconds, not peak_memory_bytes, seconds",
        "pages": "[31mred [0m [31mred",
    },
}
"""What each bad client does in its first, second and third round, and how that is told."""

LIARS = {
    "lia": ("tier", "its tier 'giant' is not known"),
    "lio": ("name", "it says it is client 'c0'; its key is registered as 'lio'"),
    "liu": ("no message", "without emberfed's record"),
    "lea": ("pages", "[31mred [0m [31mred"),
}
"""Clients that describe themselves wrongly, and how that is told."""


@pytest.mark.slow
def test_bad_clients_are_refused_by_name_and_leave_no_trace(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Of nine clients four lie about themselves and never take part, three send something else wrong in each of three
    rounds, and in the fourth one of these answers twice, honestly first. All files of the run have the bits of one on
    a machine where those three say nothing for three rounds.
    """
    values = of_three(tiny_model_folder, tiny_data, training={"rounds": 4, "max_steps": 1})
    tiers = [{**tier, "share": share} for tier, share in zip(values["clients"]["tiers"], (0.6, 0.4), strict=True)]
    values["clients"] = {"count": 5, "tiers": tiers}
    flaky = {"name": "flaky", "faults": dict.fromkeys(BAD, "drop"), "rounds": [1, 2, 3]}
    local = here({**values, "engine": flaky}, tmp_path / "local")
    with grounds(tmp_path / "deployment", values, [*GOOD, *BAD, *LIARS]) as place:
        server = place.server(*QUICK)
        script = str(Path(__file__).with_name("liar.py"))
        for name, (lie, _) in LIARS.items():
            folders = str(place.path / "certificates" / name), str(place.path / f"state-{name}")
            place.start_python(name, script, f"localhost:{place.port}", *folders, name, lie)
        for name, (_, words) in LIARS.items():
            place.wait_for("server", f"client {name} cannot take part")
            (told,) = [line for line in place.log("server").splitlines() if f"client {name} cannot take part" in line]
            assert words in told
            assert len(told) < 1200
        for name in GOOD:
            place.client(name)
        for name, faults in FAULTS.items():
            bad_client(place, name, [*faults, *(["twice"] if name == "c1" else [])])
        assert place.ended(server, 480.0) == 0, "\n".join(place.everything())
        rounds = lines(place.run, "round")
        for number, line in enumerate(rounds[:3]):
            assert line["replied"] == sorted(GOOD)
            reasons = {**line["failed"], **line["refused"]}
            assert sorted(reasons) == sorted(BAD)
            for name, faults in FAULTS.items():
                words = list(faults.values())[number]
                assert words in reasons[name]
                assert reasons[name].isprintable()
                assert len(reasons[name]) < 1200
        assert rounds[3]["replied"] == sorted([*GOOD, *BAD])
        assert bits(place.run) == bits(local)
        text = "".join(place.everything())
        assert "Traceback" not in text
        assert "\x1b[31m" not in text


def bad_client(place: Grounds, name: str, faults: list[str]) -> subprocess.Popen[bytes]:
    """Start a client that goes wrong."""
    own = ["--data", str(place.path / "parts" / name), "--tier", place.tiers[name]]
    own += ["--certificates", str(place.path / "certificates" / name), "--state", str(place.path / f"state-{name}")]
    script = str(Path(__file__).with_name("bad_client.py"))
    told = [script, ",".join(faults), "client", str(place.config), "--server", f"localhost:{place.port}", *own]
    return place.start_python(name, *told)


# ------------------------------------------------------------------------------------------ the keeper's mistakes


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of a server and two clients. Do not write to it."""
    folder = tmp_path_factory.mktemp("certificates")
    certificates.make(folder, ["localhost"], ["anna", "ben"], 30)
    return folder


@pytest.fixture
def written(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> Path:
    """A configuration file."""
    return write_config(tmp_path / "config.yaml", config(tiny_model_folder, tiny_data))


def refused(code: int, *command: str | Path) -> str:
    """Return the one line that a command ends with."""
    ended = invoke(*command)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("emberfed: ")]
    assert "Traceback" not in ended.stderr
    assert ended.exit_code == code, line
    return line


def as_client(written: Path, data: Path, server: str, *more: str | Path) -> tuple[str | Path, ...]:
    places = "--data", data, "--server", server, "--state", written.parent / "state", "--patience", "1"
    return "client", written, *places, *more


@pytest.mark.parametrize("side", ["server", "client"])
@pytest.mark.parametrize("both", [True, False])
def test_certificates_or_none_is_a_choice_that_must_be_made(
    side: str, both: bool, written: Path, tiny_data: Path, made: Path, tmp_path: Path
) -> None:
    own = ("--output", tmp_path / "run") if side == "server" else ("--data", tiny_data, "--server", "localhost:1")
    line = refused(
        ConfigError.exit_code, side, written, *own, *(("--certificates", made, "--insecure") if both else ())
    )
    assert ("not both" if both else "or --insecure: then nothing is encrypted and anybody may join") in line


def test_a_client_s_connection_is_looked_at_before_anything_is_loaded(
    written: Path, made: Path, tmp_path: Path
) -> None:
    """Its data is not there either, which nobody hears of as long as the connection is what is wrong."""
    certificates.make(tmp_path / "other", ["localhost"], ["anna"], 30)
    no_key = shutil.copytree(made / "anna", tmp_path / "no-key")
    (no_key / "client.key").unlink()
    expired = Path(shutil.copytree(made, tmp_path / "expired"))
    reissue(expired, (-3, -1))
    anna, nobody = ("--certificates", made / "anna"), ("--insecure", "--name", "anna")
    wrong_ca = ("--certificates", tmp_path / "other" / "anna")

    def told(server: str, who: tuple[str | Path, ...]) -> str:
        options = (*who, "--tier", "small")
        return refused(EngineError.exit_code, *as_client(written, tmp_path / "none", server, *options))

    with listening(made / "server") as secured:
        port = secured.partition(":")[2]
        assert "is not signed by the CA in" in told(secured, wrong_ca)
        assert "is not for '127.0.0.1'" in told(f"127.0.0.1:{port}", anna)
        assert "speaks TLS" in told(secured, nobody)
        assert "client.key is missing" in told(secured, ("--certificates", no_key))
    with listening(expired / "server") as server:
        assert "has expired; make a new one where its CA's key is" in told(server, anna)
    with listening(None) as plain:
        assert "does not speak TLS" in told(plain, anna)
    assert "cannot be that of a machine" in told("a..b:9092", anna)
    line = refused(ConfigError.exit_code, *as_client(written, tmp_path, "localhost", *nobody, "--tier", "small"))
    assert "is not HOST:PORT" in line
    assert not (tmp_path / "state").exists()


def test_a_client_without_data_name_or_tier_is_told(written: Path, made: Path, tiny_data: Path, tmp_path: Path) -> None:
    """The server may come later: nobody waits for it with data that cannot be used."""
    server = f"localhost:{free_port()}"
    (tmp_path / "empty").mkdir()
    anna = "--certificates", made / "anna"
    for folder in ("none", "empty"):
        command = as_client(written, tmp_path / folder, server, *anna, "--tier", "small")
        assert str(tmp_path / folder) in refused(DataError.exit_code, *command)
    cases: dict[str, tuple[str | Path, ...]] = {
        "tier 'giant' is not one of clients.tiers": (*anna, "--tier", "giant"),
        "--tier is missing; there are small, middle, large": anna,
        "say who it is with --name": ("--insecure", "--tier", "small"),
    }
    for words, options in cases.items():
        assert words in refused(ConfigError.exit_code, *as_client(written, tiny_data, server, *options))


def test_a_server_that_is_not_there_is_waited_for_and_then_given_up(written: Path, made: Path, tiny_data: Path) -> None:
    server = f"localhost:{free_port()}"
    own = "--certificates", made / "anna", "--tier", "small"
    line = refused(EngineError.exit_code, *as_client(written, tiny_data, server, *own))
    assert f"nothing listens at {server}" in line
    assert "(waited 1 seconds)" in line


def test_a_server_s_certificates_and_port_are_looked_at(written: Path, made: Path, tmp_path: Path) -> None:
    expired = Path(shutil.copytree(made, tmp_path / "expired"))
    reissue(expired, (-3, -1))
    command = "server", written, "--output", tmp_path / "run", "--state", tmp_path / "state"
    assert "expired" in refused(EngineError.exit_code, *command, "--certificates", expired / "server")
    assert "ca.pem is missing" in refused(EngineError.exit_code, *command, "--certificates", tmp_path / "none")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = "--host", "127.0.0.1", "--port", str(taken.getsockname()[1])
        line = refused(EngineError.exit_code, *command, "--certificates", made / "server", *where)
        assert "is taken: stop what has it, or choose another" in line
    assert "is no address to listen on" in refused(EngineError.exit_code, *command, "--insecure", "--host", "a..b")
    assert not (tmp_path / "run").exists()


def test_a_server_to_which_too_few_come_says_so(written: Path, made: Path, tmp_path: Path) -> None:
    where = "--output", tmp_path / "run", "--state", tmp_path / "state", "--port", str(free_port())
    own = "--certificates", made / "server", "--set", "engine.join_seconds=0.2"
    line = refused(EngineError.exit_code, "server", written, *where, *own)
    assert "0 of 4 clients joined within 0.2 s (engine.join_seconds): none; start the others" in line
    assert not (tmp_path / "run").exists()


def began(checked: RunConfig, path: Path) -> Path:
    """Return the folder of a deployment's run that has done nothing yet."""
    home = deployment.home(checked)
    counts = {**home.test.report.json(), "examples": 5, "kept_apart": 0}
    tiers = [tier.name for tier in checked.clients.tiers]
    clients = [Enrolled(f"c{number}", tiers[number % len(tiers)], counts) for number in range(checked.clients.count)]
    assembly.start(checked, path, deployment.material(home, Roll.of(clients, home.test)))
    return path


def test_a_run_of_other_settings_or_of_another_kind_is_not_gone_on_with(
    written: Path, tiny_model_folder: Path, tiny_data: Path, made: Path, tmp_path: Path
) -> None:
    values = config(tiny_model_folder, tiny_data, engine={"name": "flower"})
    run = began(parse(values), tmp_path / "run")
    own = "--state", tmp_path / "state", "--certificates", made / "server", "--port", str(free_port())
    for change in ("training.learning_rate=0.5", "adapter.rank=3", "seed=4"):
        line = refused(RunFolderError.exit_code, "server", written, "--output", run, *own, "--set", change)
        assert f"({change.partition('=')[0]})" in line
    assert "emberfed server CONFIG --output RUN" in refused(ConfigError.exit_code, "resume", run)
    plain = emberfed.run({**values, "engine": {"name": "local"}}, output=tmp_path / "plain").path
    line = refused(RunFolderError.exit_code, "server", written, "--output", plain, *own)
    assert "is not the run of a deployment" in line
    assert not (tmp_path / "state").exists()


WITHOUT = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from typer.testing import CliRunner
from emberfed.cli.app import app
ended = [CliRunner().invoke(app, command) for command in json.loads(sys.argv[2])]
print(json.dumps([[one.exit_code, one.stderr] for one in ended]))
"""


def without(module: str, *commands: list[str]) -> list[tuple[int, str]]:
    """Return how each command ends, and what it says, in a process that has no such module."""
    told = [sys.executable, "-c", WITHOUT, module, json.dumps(commands)]
    ended = subprocess.run(told, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, check=True)
    return [(code, said) for code, said in json.loads(ended.stdout.splitlines()[-1])]


@pytest.mark.slow
def test_without_the_extra_emberfed_works_and_deployments_name_it(written: Path, tmp_path: Path) -> None:
    run, plain = str(tmp_path / "run"), str(tmp_path / "plain")
    here_ = ["--set", "training={rounds: 1, max_steps: 1}", "--set", "evaluation={every: 0, max_examples: 1}"]
    (works, _), *others = without(
        "flwr",
        ["run", str(written), "--output", plain, *here_],
        ["server", str(written), "--output", run, "--insecure"],
        ["client", str(written), "--data", "x", "--server", "localhost:1", "--insecure", "--name", "a"],
        ["run", str(written), "--output", run, "--set", "engine={name: flower}"],
        ["run", str(written), "--output", run, "--set", "engine={name: flower-simulation}"],
    )
    assert works == 0
    others += without("ray", ["run", str(written), "--output", run, "--set", "engine={name: flower-simulation}"])
    others += without("cryptography", ["certificates", run, "--server", "localhost", "--client", "a"])
    words: tuple[str, ...] = ("engine flower needs flwr",) * 3
    words += (
        "engine flower-simulation needs flwr",
        "engine flower-simulation needs ray",
        "certificates need cryptograph",
    )
    for (code, said), needed in zip(others, words, strict=True):
        assert code == ConfigError.exit_code
        extra = "simulation" if "simulation" in needed else "flower"
        (line,) = said.splitlines()
        assert line.startswith(f"emberfed: error: {needed}")
        assert line.endswith(f": pip install 'emberfed[{extra}]'")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ clients that do not fit


def test_two_clients_with_one_key_are_not_both_let_in(made: Path, tmp_path: Path) -> None:
    """The one that came first goes on."""
    port = free_port()
    settings = DeploymentConfig(host="127.0.0.1", port=port, grace_seconds=0.0)
    link = open_link(settings, tmp_path / "server", made / "server", ignore)
    try:
        federation = Federation(link, port, made)
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        with client(federation, tmp_path / "a", made / "anna") as first:
            until(lambda: "Connected" in first.told(), 60.0)
            with client(federation, tmp_path / "b", made / "anna") as second:
                assert second.process.wait(60) == EngineError.exit_code
                assert "a client with the same key is connected" in second.told()
            assert first.process.poll() is None
            assert not isinstance(federation.answer(federation.ask("anna", what="echo")), str)
    finally:
        link.close()


@pytest.mark.slow
def test_clients_of_another_configuration_are_named_on_both_sides(
    tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """Other settings, and another tokenizer; the server that has none of them in time ends, and says why."""
    values = of_three(tiny_model_folder, tiny_data, training={"rounds": 1, "max_steps": 1})
    other = tmp_path / "other-model"
    shutil.copytree(tiny_model_folder, other)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(other)
    changes = {
        "c0": (("adapter.rank=3", "training.max_steps=2"), "settings adapter.rank: the server has 2, the client 3"),
        "c1": (("data.template=alpaca",), 'settings data.template: the server has "short", the client "alpaca"'),
        "c2": ((f"model.tokenizer={other}",), "tokenizer or preprocessing: the server has"),
    }
    with grounds(tmp_path / "deployment", values) as place:
        server = place.server(*QUICK, "--set", "engine.join_seconds=60")
        for name, (settings, _) in changes.items():
            place.client(name, *(word for one in settings for word in ("--set", one)))
        for name, (_, words) in changes.items():
            place.wait_for(name, "the server was told that this client cannot take part")
            assert words in place.log(name)
            place.wait_for("server", f"client {name} cannot take part")
        assert place.ended(server) == EngineError.exit_code, "\n".join(place.everything())
        line = place.log("server").splitlines()[-1]
        assert "0 of 3 clients joined within 60 s" in line
        for name, (_, words) in changes.items():
            assert f"{name} cannot take part: " in line
            assert words in line
        assert "Traceback" not in "".join(place.everything())
        assert not place.run.exists()
