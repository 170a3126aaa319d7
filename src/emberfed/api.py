"""What Python users call: `emberfed.run`, `emberfed.resume`, `emberfed.evaluate`. The command line calls the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

from emberfed import assembly, clients, config, events, rounds, storage
from emberfed.checkpoint import RunFolder, check_free
from emberfed.config import RunConfig
from emberfed.errors import ConfigError, RunFolderError
from emberfed.models.loading import cpu_threads
from emberfed.records import Json
from emberfed.report import write_report
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
    path = Path(output) if output is not None else free_path(checked, source)
    check_free(path)
    with cpu_threads(checked.model.threads):
        material = assembly.gather(checked)
        folder = assembly.start(checked, path, material)
        with folder.locked():
            return _carry_out(checked, folder, material, listen)


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
    with _reopened(folder, checked) as material:
        storage.write(folder.path / "config.yaml", checked.yaml().encode())
        return _carry_out(checked, folder, material, listen)


def evaluate(
    path: str | Path, *, top_k: Sequence[int] | None = None, listen: events.Listener = events.ignore
) -> list[dict[str, Json]]:
    """Evaluate a run's newest whole round on the held-out split; one line per budget, as in metrics.jsonl.

    Args:
        path: The run's folder.
        top_k: Numbers of active experts; None: those of the run's tiers.
        listen: Hears of progress.

    Raises:
        EmberfedError: one of its kinds.
    """
    folder = RunFolder.open(Path(path))
    checked = config.load(folder.path / "config.yaml")
    if not folder.rounds():
        raise RunFolderError(f"{path} holds no whole round yet; go on with `emberfed resume {path}`")
    with _reopened(folder, checked) as material:
        found = folder.latest()
        assert found is not None, "there is a round, and a damaged one raises"
        round, state, problems = found
        for problem in problems:
            listen(events.Notice("warning", f"{problem}; evaluating round {round}"))
        federation = assembly.federate(checked, folder, material, listen)
        if top_k is not None:
            tiers = [clients.Tier(name=f"K={k}", share=1 / len(top_k), top_k=k) for k in top_k]
            budgets = clients.resolve(tiers, material.model.native_top_k, material.model.num_experts)
            federation = replace(federation, budgets=tuple(budgets))
        return rounds.evaluate_tiers(federation, state, round, listen)


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
def _reopened(folder: RunFolder, checked: RunConfig) -> Iterator[assembly.Material]:
    """Hold an existing run, with the material it began with. Raises: EmberfedError."""
    assembly.check_same_settings(folder, checked)
    with folder.locked(), cpu_threads(checked.model.threads):
        material = assembly.gather(checked)
        assembly.check_same_data(folder, material)
        yield material


def _config(source: str | Path | Mapping[str, Any] | None, overrides: Sequence[str]) -> RunConfig:
    if isinstance(source, Mapping):
        return config.parse(override(source, overrides))
    return config.load(None if source is None else Path(source), overrides)


def _carry_out(checked: RunConfig, folder: RunFolder, material: assembly.Material, listen: events.Listener) -> Run:
    federation = assembly.federate(checked, folder, material, listen)
    try:
        rounds.run(federation, folder, listen)
    finally:
        federation.engine.close()
    write_report([folder.path], folder.path / "report.html")
    return Run(folder.path)
