"""What Python users call: `emberfed.run`, `resume`, `evaluate` and `export`. The command line calls the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, final

from emberfed import assembly, clients, config, deployment, events, federated_experts, provenance, rounds, storage
from emberfed.checkpoint import RunFolder, check_free
from emberfed.config import RunConfig
from emberfed.engines.local import LocalConfig, LocalEngine
from emberfed.errors import ConfigError, RunFolderError
from emberfed.material import Material
from emberfed.models import merging, peft_layout, sparse_adapter_files
from emberfed.models.loading import cpu_threads
from emberfed.models.sparse_adapter import SparseAdapterConfig
from emberfed.records import Json
from emberfed.report import write_report
from emberfed.rounds import Federation
from emberfed.sections import override


@final
@dataclass(frozen=True, slots=True)
class Run:
    """A run on disk."""

    path: Path

    def metrics(self) -> list[dict[str, Json]]:
        """Return the lines of metrics.jsonl: evaluations and rounds, in order."""
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]


def run(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    listen: events.Listener = events.ignore,
) -> Run:
    """Run a federation from start to report.

    Args:
        source: A config file, a mapping of sections, or None for the built-in quickstart.
        overrides: Assignments such as `training.rounds=4`.
        output: The run's folder, absent or empty; None: a free name below `output.folder`.
        listen: Hears of progress.

    Raises:
        EmberfedError: one of its kinds; whatever was finished is on disk and `resume` goes on from it.
    """
    checked = _config(source, overrides)
    path = (Path(output) if output is not None else free_path(checked, source)).absolute()
    return begin(checked, path, assembly.Materials(), listen)


def begin(checked: RunConfig, path: Path, materials: assembly.Materials, listen: events.Listener) -> Run:
    """Run a federation from start to report in a folder that is absent or empty. Raises: EmberfedError."""
    _check_here(checked)
    check_free(path)
    with cpu_threads(checked.model.threads):
        material = materials.gather(checked)
        folder = assembly.start(checked, path, material)
        with folder.locked():
            return carry_out(assembly.federate(checked, folder, material, listen), folder, listen)


def resume(path: str | Path, *, rounds: int | None = None, listen: events.Listener = events.ignore) -> Run:
    """Go on with a run from its last whole round; the result has the same bits as a run without interruption.

    Args:
        path: The run's folder.
        rounds: Rounds in all, to go on beyond what the config says; None: as configured.
        listen: Hears of progress.

    Raises:
        EmberfedError: one of its kinds.
    """
    folder = RunFolder.open(Path(path))
    checked = config.load(folder.path / "config.yaml")
    if rounds is not None:
        done = max(folder.rounds(), default=0)
        if rounds < done:
            raise ConfigError(f"{path} has {done} rounds already; --rounds must be at least that, found {rounds}")
        checked = replace(checked, training=checked.training.model_copy(update={"rounds": rounds}))
    return go_on(checked, folder, assembly.Materials(), listen)


def go_on(checked: RunConfig, folder: RunFolder, materials: assembly.Materials, listen: events.Listener) -> Run:
    """Go on with a run, as configured now, from its last whole round.

    Raises:
        EmberfedError: one of its kinds; also if settings, data or model are not those the run began with.
    """
    _check_here(checked)
    with _reopened(folder, checked, materials) as material:
        storage.write(folder.path / "config.yaml", checked.yaml().encode())
        return carry_out(assembly.federate(checked, folder, material, listen), folder, listen)


def evaluate(
    path: str | Path,
    *,
    top_k: Sequence[int] | None = None,
    adapter_top_k: Sequence[int] | None = None,
    listen: events.Listener = events.ignore,
) -> list[dict[str, Json]]:
    """Evaluate a run's newest whole round on the held-out split; one line per budget, as in metrics.jsonl.

    Args:
        path: The run's folder.
        top_k: Numbers of active experts; None: those of the run's tiers.
        adapter_top_k: The same of a sparse adapter's experts, at the checkpoint's own `top_k`; not both.
        listen: Hears of progress.

    Raises:
        EmberfedError: one of its kinds.
    """
    folder = RunFolder.open(Path(path))
    checked = config.load(folder.path / "config.yaml")
    tiers = _asked_tiers(top_k, adapter_top_k)
    if adapter_top_k is not None and checked.method_type.experts != "adapter":
        raise ConfigError(
            f"{checked.method_type.title} has no adapter beside the FFN, so adapter_top_k has no effect; give top_k, "
            f"or neither"
        )
    if top_k is not None and checked.method_type.AdapterConfig is SparseAdapterConfig:
        raise ConfigError(
            f"{checked.method_type.title} chooses among its adapter's experts, so top_k alone is not enough; give "
            f"adapter_top_k (--adapter-top-k), or neither"
        )
    if not folder.rounds():
        raise RunFolderError(f"{path} holds no whole round yet; go on with `emberfed resume {path}`")
    with _reopened(folder, checked, assembly.Materials()) as material:
        found = folder.latest()
        assert found is not None, "there is a round, and a damaged one raises"
        round, state, problems = found
        for problem in problems:
            listen(events.Notice("warning", f"{problem}; evaluating round {round}"))
        engine = LocalEngine(LocalConfig(), assembly.worker(checked, folder.path, material.here, listen))
        federation = assembly.federation(checked, material, assembly.method(checked, listen), engine)
        if tiers:
            budgets = clients.resolve(tiers, material.model.native_top_k, material.model.largest_top_k)
            federation = replace(federation, evaluated=tuple(budgets))
        return rounds.evaluate_tiers(federation, state, round, listen)


def _asked_tiers(top_k: Sequence[int] | None, adapter_top_k: Sequence[int] | None) -> list[clients.Tier]:
    """Return a tier for each number of active experts asked for; none if nothing was. Raises: ConfigError."""
    if top_k is not None and adapter_top_k is not None:
        raise ConfigError("give top_k or adapter_top_k, not both")
    for name, values in (("top_k", top_k), ("adapter_top_k", adapter_top_k)):
        if values is None:
            continue
        usable = isinstance(values, Sequence) and all(type(k) is int and k >= 1 for k in values)
        if not usable or not values or len(set(values)) < len(values):
            raise ConfigError(f"{name} {values!r}: expected different whole numbers from 1, such as [1, 2, 4, 8]")
    if adapter_top_k is not None:
        return [clients.Tier(name=f"k={k}", share=1 / len(adapter_top_k), adapter_top_k=k) for k in adapter_top_k]
    return [] if top_k is None else [clients.Tier(name=f"K={k}", share=1 / len(top_k), top_k=k) for k in top_k]


def export(
    run: str | Path,
    *,
    output: str | Path,
    format: Literal["adapter", "peft", "merged"] = "adapter",
    round: int | None = None,
) -> Path:
    """Write a round's global model for other programs, and return the folder.

    Args:
        run: The run's folder.
        output: The folder to write, absent or empty, not among a run's rounds. It appears only when all of it is
            written.
        format: `adapter` is what was trained, in its own format: a LoRA as `peft`; an adapter beside the FFN (FFT-MoE,
            dense adapter) or a head alone for `emberfed.load_adapter`; experts trained in full as their weights.
            `peft` is a LoRA, for `PeftModel.from_pretrained`; `merged` is the base with the LoRA added to its
            weights, or with the experts that were trained in the place of its own, a checkpoint for
            `AutoModelForCausalLM.from_pretrained`. Its numbers are in `model.dtype` of the run; 16-bit ones round what
            was trained. A base that the run quantised, or kept on disk, is loaded whole into memory for it.
        round: Which round; None: the newest whole one.

    Raises:
        EmberfedError: one of its kinds.
    """
    if format not in ("peft", "adapter", "merged"):
        raise ConfigError(f"export format {format!r} is unknown; there are 'adapter', 'merged' and 'peft'")
    folder, target = RunFolder.open(Path(run)), Path(output).absolute()
    checked = config.load(folder.path / "config.yaml")
    check_free(target)
    _check_not_among_rounds(target)
    source, files = _exported(folder, _chosen_round(folder, round))
    if format == "peft" and federated_experts.EXPERTS_FILE in files:
        raise ConfigError(
            f"{run} has no LoRA: it trained experts in full (adapter.tune), which PEFT has no format for; export it "
            f"with format merged, or adapter for the trained weights alone"
        )
    settings = files.get(peft_layout.CONFIG_FILE)
    if format != "adapter" and settings is not None and sparse_adapter_files.is_ours(settings):
        raise ConfigError(
            f"{run} has no LoRA: what it trained is not in PEFT's format and cannot be merged; export it with format "
            f"adapter"
        )
    with storage.new_folder(target) as filled:
        if format != "merged":
            for name, data in files.items():
                storage.write(filled / name, data)
        else:
            _write_merged(checked, folder, source, files, filled)
    return target


def _check_not_among_rounds(target: Path) -> None:
    """Check that a folder does not lie where a run has its rounds. Raises: ConfigError."""
    place = target.resolve()
    for folder in (place, *place.parents):
        if folder.name == "rounds" and (folder.parent / "config.yaml").is_file():
            raise ConfigError(f"{target} lies among the rounds of the run {folder.parent}; give an --output elsewhere")


def _chosen_round(folder: RunFolder, round: int | None) -> int:
    """Return the round asked for, or the newest. Raises: RunFolderError if it is not there."""
    whole = folder.rounds()
    if not whole:
        raise RunFolderError(f"{folder.path} holds no whole round yet; go on with `emberfed resume {folder.path}`")
    if round is not None and round not in whole:
        raise RunFolderError(f"{folder.path} has no round {round}; it has {', '.join(map(str, whole))}")
    return whole[-1] if round is None else round


def _exported(folder: RunFolder, round: int) -> tuple[Path, dict[str, bytes]]:
    """Return a round's folder and what it holds for other programs: PEFT's two files, or the experts' weights.

    Raises: RunFolderError if they are damaged or not there.
    """
    source = folder.round_path(round)
    state = folder.read_json(f"{source.relative_to(folder.path)}/state.json")
    digests = state.get("sha256") if isinstance(state, dict) else None
    kinds = ((peft_layout.CONFIG_FILE, peft_layout.TENSORS_FILE), (federated_experts.EXPERTS_FILE,))
    known: dict[str, str] = digests if isinstance(digests, dict) else {}
    names = next((names for names in kinds if known.keys() >= set(names)), None)
    if names is None:
        raise RunFolderError(f"round {round} of {folder.path} has no PEFT adapter: its method writes none")
    files = {name: (source / name).read_bytes() for name in names if (source / name).is_file()}
    for name in names:
        if hashlib.sha256(files.get(name, b"")).hexdigest() != known[name]:
            raise RunFolderError(f"{source / name} is damaged or gone; export another round (--round)")
    return source, files


def _write_merged(
    checked: RunConfig, folder: RunFolder, source: Path, files: Mapping[str, bytes], target: Path
) -> None:
    provenance.check_same_settings(folder, checked)
    unquantised = checked.model.model_copy(update={"expert_bits": None, "expert_storage": "memory"})
    with cpu_threads(checked.model.threads):
        processor = checked.task.processor(unquantised)
        classes = folder.read_object("run.json").get("classes", [])
        model = checked.task.model(unquantised, processor, classes)
        # The numbers of a base that the run held in fewer bits are not those of the one it is merged with.
        provenance.check_same_model(folder, model, ignoring=() if checked.model.expert_bits is None else ("sha256",))
        experts = files.get(federated_experts.EXPERTS_FILE)
        if experts is None:
            merging.merge_into(model, *peft_layout.from_peft(source, model))
        else:
            merging.replace_experts(model, *federated_experts.read_experts(experts))
        merging.write_checkpoint(model, processor, target)


def free_path(checked: RunConfig, source: str | Path | Mapping[str, Any] | None) -> Path:
    """Return a free folder for a new run: its name, or its name with a number behind."""
    stem = Path(source).stem if isinstance(source, str | Path) else "quickstart" if source is None else "run"
    first = Path(checked.output.folder) / (checked.output.name or stem)
    return next(
        candidate
        for number in range(1, 100_000)
        if not (candidate := first if number == 1 else first.with_name(f"{first.name}-{number}")).exists()
    )


@contextmanager
def _reopened(folder: RunFolder, checked: RunConfig, materials: assembly.Materials) -> Iterator[Material]:
    """Hold an existing run, with the material it began with. Raises: EmberfedError."""
    provenance.check_same_settings(folder, checked)
    with folder.locked(), cpu_threads(checked.model.threads):
        deployed = deployment.is_one(folder)
        material = deployment.reopened(checked, folder) if deployed else materials.gather(checked)
        provenance.check_same_data(folder, material)
        provenance.check_same_model(folder, material.model)
        yield material


def _check_here(checked: RunConfig) -> None:
    """Check that clients are on this machine. Raises: ConfigError."""
    if checked.engine_type.deployed:
        raise ConfigError(
            f"engine {checked.engine_name} has clients on other machines: start it with `emberfed server CONFIG "
            f"--output RUN`, which also goes on with a run that began"
        )


def _config(source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]) -> RunConfig:
    if isinstance(source, Mapping):
        return config.parse(override(source, overrides))
    return config.load(None if source is None else Path(source), overrides)


def carry_out(federation: Federation, folder: RunFolder, listen: events.Listener) -> Run:
    """Run the rounds that are missing, release the engine, and write the report. Raises: EmberfedError."""
    try:
        rounds.run(federation, folder, listen)
    finally:
        federation.engine.close()
    write_report([folder.path], folder.path / "report.html")
    return Run(folder.path)
