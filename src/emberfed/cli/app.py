"""The commands. Each one calls what Python users call, and shows what comes back."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from emberfed import __version__
from emberfed.cli.output import output
from emberfed.errors import ConfigError

app = typer.Typer(
    help="Federated fine-tuning of sparse mixture-of-experts models: every client activates as many experts as it "
    "can afford.",
    epilog="Example: emberfed run --set training.rounds=2",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Look at data, or hand it out.", no_args_is_help=True, epilog="Example: emberfed data inspect config.yaml"
)
app.add_typer(data_app, name="data")

Config = Annotated[Path | None, typer.Argument(help="A configuration file; none: the built-in quickstart.")]
RunPath = Annotated[Path, typer.Argument(help="A run folder, as `emberfed run` writes it.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, e.g. training.rounds=2. May be repeated."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document on standard output, and nothing else.")]


class ExportFormat(StrEnum):
    """What `emberfed export` writes."""

    adapter = "adapter"
    peft = "peft"
    merged = "merged"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"emberfed {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command(epilog="Example: emberfed run config.yaml --set training.rounds=5 --output runs/five")
def run(
    config: Config = None,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The run's folder, absent or empty; none: a free one in runs/."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train from start to report."""
    with output(as_json).errors():
        from emberfed import config as configuration
        from emberfed.api import free_path
        from emberfed.cli import training

        checked = configuration.load(config, overrides or ())
        path = folder if folder is not None else free_path(checked, config)
        summary = training.run(config, overrides or (), path, checked)
        training.show(output(as_json), summary)


@app.command(epilog="Example: emberfed resume runs/quickstart --rounds 6")
def resume(
    run: RunPath,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds in all, to go on beyond what the configuration says.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Go on with a run that was stopped, or add rounds to one that is complete."""
    with output(as_json).errors():
        from emberfed.cli import training

        training.show(output(as_json), training.resume(run, rounds))


@app.command(epilog="Example: emberfed compare config.yaml --methods a3smoe,flame,flexlora --seeds 3 --output arena")
def compare(
    source: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="A configuration, or an arena; none: the built-in quickstart."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(metavar="NAME,NAME,...", help="What to compare; of an arena: only these of its methods."),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N|S,S,...", help="How many seeds, or which; none: 3, or as the arena says."),
    ] = None,
    overrides: Overrides = None,
    folder: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The comparison's folder; none: compare-NAME in runs/."),
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes, each running whole runs; results are the same.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Run methods beside each other, over seeds, and compare them; the same command goes on where it was stopped."""
    with output(as_json).errors():
        from emberfed.arena import grid as grids
        from emberfed.cli import compare as comparing

        chosen = None if seeds is None else comparing.seeds(seeds)
        names = None if methods is None else [name.strip() for name in methods.split(",")]
        grid = grids.load(source, methods=names, seeds=chosen, overrides=overrides or ())
        path = folder if folder is not None else grid.folder
        found = comparing.run(grid, path, jobs)
        output(as_json).result(comparing.document(found, path), *comparing.tables(found, path))
        if found.failures:
            raise typer.Exit(1)


@app.command(epilog="Example: emberfed evaluate runs/quickstart --top-k 1,2,4,8")
def evaluate(
    run: RunPath,
    top_k: Annotated[
        str | None, typer.Option(metavar="K,K,...", help="Numbers of active experts; none: those of the run's tiers.")
    ] = None,
    adapter_top_k: Annotated[
        str | None, typer.Option(metavar="K,K,...", help="The same of a sparse adapter's experts (FFT-MoE).")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate a run's newest round on its held-out examples."""
    with output(as_json).errors():
        wanted = None if top_k is None else _whole_numbers("--top-k", top_k)
        own = None if adapter_top_k is None else _whole_numbers("--adapter-top-k", adapter_top_k)
        from emberfed.cli import tables, training

        lines = training.evaluate(run, wanted, own)
        shown = [tables.evaluations(lines)]
        if len(lines[0]["categories"]) > 1:
            shown.append(tables.categories(lines))
        output(as_json).result({"evaluations": lines}, *shown)


def _whole_numbers(option: str, text: str) -> list[int]:
    """Parse `1,2,4`. Raises: ConfigError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"{option} {text!r}: expected different whole numbers above 0, e.g. {option} 1,2,4,8")
    return [int(part) for part in parts]


@app.command(epilog="Example: emberfed export runs/quickstart --format merged --output my-model")
def export(
    run: RunPath,
    folder: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write, absent or empty.")],
    format: Annotated[
        ExportFormat,
        typer.Option(
            help="adapter: what was trained, in its own format (a LoRA in PEFT's, else for emberfed.load_adapter). "
            "peft: the LoRA, for PEFT. merged: the base with the LoRA in it, for transformers."
        ),
    ] = ExportFormat.adapter,
    round: Annotated[int | None, typer.Option(min=0, help="Which round; none: the newest.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write what was trained for other programs: an adapter, or merged into a Hugging Face checkpoint."""
    with output(as_json).errors():
        from emberfed import api
        from emberfed.cli.stopping import Stop

        with Stop().on_signals():
            written = api.export(run, output=folder, format=format.value, round=round)
        document = {"run": str(run), "format": format.value, "output": str(written)}
        output(as_json).result(document, Text(f"{format.value} written to {written}"))


@app.command(epilog="Example: emberfed upcycle llama-7b llama-moe --experts 16 --top-k 4 --method clustered")
def upcycle(
    dense: Annotated[Path, typer.Argument(metavar="DENSE", help="The folder of a dense LLaMA or Mistral model.")],
    folder: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The folder to write, absent or empty.")],
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 8,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 2,
    method: Annotated[
        str, typer.Option(help="random or clustered: divide the neurons among experts. copy: each has them all.")
    ] = "random",
    output_scale: Annotated[
        float | None, typer.Option(help="Factor on the experts' outputs; none: top-k, or 1 for copy.")
    ] = None,
    router_std: Annotated[float, typer.Option(help="Standard deviation of the new routers' weights.")] = 0.02,
    seed: Annotated[int, typer.Option(help="Of the division and of the routers.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Make a sparse mixture-of-experts checkpoint (Mixtral architecture) of a dense one."""
    with output(as_json).errors():
        from emberfed.cli import upcycle as upcycling

        values = {"num_experts": experts, "top_k": top_k, "method": method, "seed": seed}
        values |= {"output_scale": output_scale, "router_std": router_std}
        output(as_json).result(*upcycling.run(dense, folder, values))


@app.command(epilog="Example: emberfed report runs/a runs/b --output comparison.html")
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders.")],
    file: Annotated[
        Path | None,
        typer.Option("--output", metavar="FILE", help="The page; none: report.html in the run, here if several."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write the report of one run, or of several beside each other, as one HTML file."""
    with output(as_json).errors():
        from emberfed.report import write_report

        default = runs[0] / "report.html" if len(runs) == 1 else Path("report.html")
        written = write_report(runs, file if file is not None else default)
        output(as_json).result({"report": str(written)}, Text(f"report written to {written}"))


@app.command(epilog="Example: emberfed methods a3smoe")
def methods(
    names: Annotated[
        list[str] | None, typer.Argument(help="These, with all their options; none: a list of all.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the federated methods; with names, their options and defaults."""
    with output(as_json).errors():
        from emberfed.cli import tables
        from emberfed.cli.options import options, summary_line
        from emberfed.method import load_method, method_names

        found = [(name, load_method(name)) for name in names or method_names()]
        documents = [
            {
                "name": name,
                "title": method.title,
                "paper": method.paper,
                "options": [option.json() for option in options(method.Config)],
                "adapter": [option.json() for option in options(method.AdapterConfig)],
            }
            for name, method in found
        ]
        shown = (
            [
                tables.method(name, method.title, method.paper, options(method.Config), options(method.AdapterConfig))
                for name, method in found
            ]
            if names
            else [tables.methods({name: (method.title, summary_line(method)) for name, method in found})]
        )
        output(as_json).result({"methods": documents}, *shown)


@app.command(epilog="Example: emberfed models --json")
def models(as_json: AsJson = False) -> None:
    """List the families of models that can be fine-tuned."""
    with output(as_json).errors():
        import importlib

        from emberfed.cli import tables
        from emberfed.models import families

        docs = {
            model_type: " ".join((importlib.import_module(f"{families.__name__}.{model_type}").__doc__ or "").split())
            for model_type in families.families()
        }
        hint = "Give model.path a hub id or local folder with one of these model types, or `builtin`."
        documents = [{"model_type": model_type, "about": about} for model_type, about in docs.items()]
        output(as_json).result({"families": documents}, tables.families(docs), hint)


@data_app.command("inspect", epilog="Example: emberfed data inspect config.yaml --set data.partition.alpha=0.1")
def inspect(config: Config = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show how the data divides among clients: sizes, labels, skew, tokens. Nothing is trained or written."""
    with output(as_json).errors():
        from emberfed import config as configuration
        from emberfed.cli import division

        inspection = division.inspect_data(configuration.load(config, overrides or ()))
        output(as_json).result(inspection.json(), *division.tables(inspection))


@data_app.command("split", epilog="Example: emberfed data split config.yaml --output parts")
def split(
    folder: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write, absent or empty.")],
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Write each client's part of the data into a folder of its own, for `emberfed client --data`."""
    with output(as_json).errors():
        from emberfed import config as configuration
        from emberfed.cli import split as splitting

        parts = splitting.split(configuration.load(config, overrides or ()), folder)
        output(as_json).result(splitting.document(parts, folder), *splitting.tables(parts, folder))


@app.command(epilog="Example: emberfed plan config.yaml --set adapter.rank=16")
def plan(config: Config = None, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Count what each tier would need: FLOPs, memory and traffic. Nothing is trained or written."""
    with output(as_json).errors():
        from emberfed import config as configuration
        from emberfed.cli import plan as planning

        plans = planning.plan(configuration.load(config, overrides or ()))
        document = {"tiers": [tier.json() for tier in plans], "warnings": planning.warnings(plans)}
        output(as_json).result(document, *planning.tables(plans))


@app.command(epilog="Example: emberfed doctor config.yaml --set model.expert_bits=4")
def doctor(
    config: Config = None,
    overrides: Overrides = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="Measure how fast this machine is, and say which tier it can afford."),
    ] = False,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="With --measure: count with this client's own data; none: with data.path."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine and the model (tiers and data: see `plan`); exit code 1 if something essential is broken."""
    with output(as_json).errors():
        from dataclasses import asdict

        from emberfed import config as configuration
        from emberfed import speed
        from emberfed.cli import affording, tables
        from emberfed.cli.doctor import examine, examine_model

        if data is not None and not measure:
            raise ConfigError("--data is what --measure counts tiers with: give both, or neither")
        checked = configuration.load(config, overrides or ())
        free_bytes = affording.free_memory_bytes(checked)
        model, memory = examine_model(checked)
        found = [*examine(Path("runs")), model]
        measured = None
        if measure:
            device = speed.measured("measured", Path("runs"))
            measured = affording.measured(checked, data, device, free_bytes)
            found.append(measured.check())
        document = {"checks": [asdict(check) for check in found], "memory": [row.json() for row in memory]}
        own, shown = ({}, []) if measured is None else (measured.json(), measured.tables())
        output(as_json).result({**document, **own}, tables.checks(found), *tables.memory(memory), *shown)
        if any(check.state == "broken" for check in found):
            raise typer.Exit(1)


Certificates = Annotated[
    Path | None, typer.Option("--certificates", metavar="DIR", help="This side's folder, of `emberfed certificates`.")
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Without certificates: nothing is encrypted, and names are believed.")
]


@app.command(epilog="Example: emberfed server config.yaml --output runs/ours --certificates certificates/server")
def server(
    folder: Annotated[
        Path,
        typer.Option("--output", metavar="DIR", help="The run's folder; one of a run that began is gone on with."),
    ],
    config: Config = None,
    overrides: Overrides = None,
    certificates: Certificates = None,
    insecure: Insecure = False,
    state: Annotated[
        Path, typer.Option(metavar="DIR", help="What the server keeps beside runs. Servers with one share a SuperLink.")
    ] = Path("emberfed-server"),
    host: Annotated[str | None, typer.Option(help="The interface to listen on; none: all (engine.host).")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Its port; none: 9092 (engine.port).")] = None,
    as_json: AsJson = False,
) -> None:
    """Run a federation whose clients are on other machines, or go on with one; their data stays there."""
    with output(as_json).errors():
        from emberfed.cli import deployment, training

        listening = [f"engine.{key}={value}" for key, value in (("host", host), ("port", port)) if value is not None]
        summary = deployment.serve(
            config,
            [*(overrides or ()), *listening],
            output=folder,
            state=state,
            certificates=certificates,
            insecure=insecure,
        )
        training.show(output(as_json), summary)


@app.command(epilog="Example: emberfed client config.yaml --data ours.jsonl --server example.org:9092 --tier laptop")
def client(
    data: Annotated[Path, typer.Option("--data", metavar="PATH", help="This client's data: a folder or a file.")],
    server: Annotated[str, typer.Option("--server", metavar="HOST:PORT", help="Where the server is.")],
    config: Config = None,
    overrides: Overrides = None,
    name: Annotated[
        str | None, typer.Option(help="This client's name at the server; none: that of its folder of certificates.")
    ] = None,
    tier: Annotated[
        str | None, typer.Option(help="Which of clients.tiers this machine is on; see `doctor --measure`.")
    ] = None,
    certificates: Certificates = None,
    insecure: Insecure = False,
    state: Annotated[
        Path | None, typer.Option(metavar="DIR", help="What the client remembers; none: emberfed-client-NAME.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="How long a server that is not there is waited for.")
    ] = 600.0,
) -> None:
    """Take part in a federation with this machine's data, until stopped."""
    with output(False).errors():
        from emberfed.cli import deployment

        deployment.join(
            config,
            overrides or (),
            data=data,
            server=server,
            name=name,
            tier=tier,
            state=state,
            certificates=certificates,
            insecure=insecure,
            patience_seconds=patience,
        )


@app.command(epilog="Example: emberfed certificates certificates --server example.org --client anna --client ben")
def certificates(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where; an existing one gets more clients.")],
    servers: Annotated[
        list[str] | None, typer.Option("--server", metavar="HOST", help="A name or address that clients dial.")
    ] = None,
    clients: Annotated[list[str] | None, typer.Option("--client", metavar="NAME", help="A client's name.")] = None,
    days: Annotated[int, typer.Option(min=1, help="How long the server's certificate is valid.")] = 365,
    as_json: AsJson = False,
) -> None:
    """Make a federation's certificates and keys: a folder for the server, and one for each client."""
    with output(as_json).errors():
        from emberfed.cli import certificates as making

        document, shown = making.make(folder, servers or (), clients or (), days)
        output(as_json).result(document, *shown)


@app.command(epilog="Example: emberfed init federation.yaml")
def init(
    file: Annotated[Path, typer.Argument(help="The file to write; it must not exist.")] = Path("emberfed.yaml"),
    task: Annotated[
        str, typer.Option(help="generation (the quickstart), image_classification or text_classification.")
    ] = "generation",
    as_json: AsJson = False,
) -> None:
    """Write a commented configuration to start from, with every key: the quickstart, or an example of another task."""
    with output(as_json).errors():
        from emberfed import config as configuration
        from emberfed import storage
        from emberfed.cli.template import annotated

        if file.exists():
            raise ConfigError(f"{file} exists and is left as it is; give another name")
        example = configuration.load(configuration.example_path(task))
        storage.write(file, annotated(example, str(file), task).encode())
        output(as_json).result({"config": str(file)}, Text(f"{file} written; run it with: emberfed run {file}"))
