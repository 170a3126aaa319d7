"""Runs what a grid lacks, one cell after another or in several processes, and writes the comparison."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, final

import torch

from emberfed import api, assembly, config, events, provenance, storage
from emberfed.arena import grid as grids
from emberfed.arena.grid import Cell, Grid
from emberfed.arena.markdown import markdown
from emberfed.arena.page import page
from emberfed.arena.results import Comparison, collect, is_done
from emberfed.checkpoint import RunFolder
from emberfed.config import RunConfig
from emberfed.errors import ConfigError, EmberfedError, RunFolderError, StorageError


@final
@dataclass(frozen=True, slots=True)
class Planned:
    """What there is to do: cells in all, and those that are not done."""

    cells: int
    waiting: tuple[Cell, ...]


@final
@dataclass(frozen=True, slots=True)
class CellStarted:
    """A cell begins, or goes on."""

    cell: Cell


@final
@dataclass(frozen=True, slots=True)
class CellProgress:
    """Something happened in a cell's run."""

    cell: Cell
    event: events.Event


@final
@dataclass(frozen=True, slots=True)
class CellDone:
    """A cell is done, or could not be run: `problem` says why (None: done)."""

    cell: Cell
    problem: str | None


Event = Planned | CellStarted | CellProgress | CellDone
Listener = Callable[[Event], None]
Outcomes = Generator[tuple[Cell, str | None]]
"""Cells as they end, each with why it could not be run (None: it is done)."""


def ignore(event: Event) -> None:
    """Listen to nothing."""


def compare(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: int | Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    jobs: int = 1,
    listen: Listener = ignore,
) -> Comparison:
    """Run every cell of a grid that is not done, and write comparison.json, comparison.md and comparison.html.

    Args:
        source: A run's configuration or an arena, as a file or a mapping; None: the built-in quickstart.
        methods: Names of methods; required unless `source` is an arena, of which it chooses.
        seeds: Their number, counted up from the configuration's, or the seeds; None: 3, or as the arena says.
        overrides: Assignments such as `training.rounds=4`, for all runs.
        output: The comparison's folder; runs found there are kept or gone on with. None: `compare-<name>` below
            `output.folder`.
        jobs: Processes that run cells, each a whole cell at a time; the results have the same bits with any number.
        listen: Hears of progress.

    Returns:
        The results; `failures` are cells that could not be run, which does not stop the others.

    Raises:
        EmberfedError: one of its kinds, if nothing can be compared; whatever was finished is on disk, and the same
            call goes on from it.
    """
    grid = grids.load(source, methods=methods, seeds=seeds, overrides=overrides)
    return carry_out(grid, Path(output) if output is not None else grid.folder, jobs, listen)


def carry_out(grid: Grid, folder: Path, jobs: int = 1, listen: Listener = ignore) -> Comparison:
    """Run every cell of a grid that is not done, and write what came of all. Raises: EmberfedError."""
    if jobs < 1:
        raise ConfigError(f"jobs {jobs}: expected a number of processes from 1")
    folder = folder.absolute()
    with storage.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with RunFolder(folder).locked():
        for cell in grid.cells:
            _check_same(cell, folder / "runs" / cell.name)
        waiting = tuple(cell for cell in grid.cells if not _complete(cell, folder / "runs" / cell.name))
        listen(Planned(len(grid.cells), waiting))
        problems: dict[str, str] = {}
        outcomes = _here(waiting, folder, listen) if jobs == 1 else _in_processes(waiting, folder, jobs, listen)
        with closing(outcomes):  # at once, whatever happens: it holds processes
            for cell, problem in outcomes:
                if problem is not None:
                    problems[cell.name] = problem
                _write(collect(grid, folder, problems), folder)
                listen(CellDone(cell, problem))
        comparison = collect(grid, folder, problems)
        _write(comparison, folder)
        storage.write(folder / "comparison.html", page(comparison).encode())
    return comparison


def _write(comparison: Comparison, folder: Path) -> None:
    storage.write_json(folder / "comparison.json", comparison.json())
    storage.write(folder / "comparison.md", markdown(comparison).encode())


def _check_same(cell: Cell, path: Path) -> None:
    """Check that a run found in a cell's folder is that cell's. Raises: RunFolderError naming what differs."""
    if not (path / "config.yaml").is_file():
        return
    folder = RunFolder.open(path)
    try:
        before, now = _scored_by(config.load(path / "config.yaml")), _scored_by(cell.config)
    except ConfigError as error:
        raise RunFolderError(
            f"{path / 'config.yaml'} cannot be used: {error}; give another --output, or remove that folder"
        ) from None
    changed = [*provenance.changed_settings(folder, cell.config), *(key for key in now if now[key] != before[key])]
    if changed:
        raise RunFolderError(
            f"{path} was run with other settings ({', '.join(changed)}), so that its results are not comparable; "
            f"give another --output, or remove that folder"
        )
    rounds = max(folder.rounds(), default=0)
    if rounds > cell.config.training.rounds:
        raise RunFolderError(
            f"{path} has {rounds} rounds already, more than the {cell.config.training.rounds} to compare after; "
            f"give another --output, or remove that folder"
        )


def _scored_by(checked: RunConfig) -> dict[str, Any]:
    """Return the settings of evaluation that change results, by key."""
    values = checked.evaluation.model_dump(mode="json")
    return {f"evaluation.{key}": value for key, value in values.items() if key not in ("every", "batch_size")}


def _complete(cell: Cell, path: Path) -> bool:
    """Return whether there is nothing to do: all rounds are there, of data and model at the same places."""
    if not is_done(cell, path):
        return False
    written, now = config.load(path / "config.yaml").values(), cell.config.values()
    parts = [place.split(".") for place in provenance.PLACES]
    # Elsewhere may lie something else: the run is opened again, which compares it with what the run began with.
    return all(written[section].get(key) == now[section].get(key) for section, key in parts)


def _here(cells: Sequence[Cell], folder: Path, listen: Listener) -> Outcomes:
    """Run cells one by one in this process. Raises: StorageError."""
    materials = assembly.Materials()
    for cell in cells:
        listen(CellStarted(cell))

        def hear(event: events.Event, cell: Cell = cell) -> None:
            listen(CellProgress(cell, event))

        yield cell, _attempt(cell.config, folder / "runs" / cell.name, materials, hear)


def _attempt(checked: RunConfig, path: Path, materials: assembly.Materials, listen: events.Listener) -> str | None:
    """Run a cell, or go on with it; return why that is not possible, None if it is done.

    Raises: StorageError, which the other cells would meet too.
    """
    try:
        if (path / "config.yaml").is_file():
            api.go_on(checked, RunFolder.open(path), materials, listen)
        else:
            api.begin(checked, path, materials, listen)
    except StorageError:
        raise
    except EmberfedError as error:
        return " ".join(str(error).split())
    except Exception as error:  # a bug in one cell must not cost a night of the others
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return " ".join(f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {error}".split())
    return None


@final
@dataclass(frozen=True, slots=True)
class _Hand:
    """A process that runs cells, and the pipe to it."""

    process: BaseProcess
    pipe: Connection


def _in_processes(cells: Sequence[Cell], folder: Path, jobs: int, listen: Listener) -> Outcomes:
    """Run cells in processes, each with its own model and data. Raises: StorageError, RunFolderError."""
    hands = [_hire() for _ in range(min(jobs, len(cells)))]
    left = list(cells)
    busy: dict[Connection, Cell] = {}

    def give(hand: _Hand) -> None:
        if left:
            cell = busy[hand.pipe] = left.pop(0)
            listen(CellStarted(cell))
            hand.pipe.send((cell.config.values(), folder / "runs" / cell.name))

    try:
        for hand in hands:
            give(hand)
        by_pipe = {hand.pipe: hand for hand in hands}
        while busy:
            for pipe in wait(list(busy)):
                assert isinstance(pipe, Connection)
                cell = busy[pipe]
                try:
                    told = pipe.recv()
                except (EOFError, OSError):
                    by_pipe[pipe].process.join()
                    raise RunFolderError(
                        f"the process of {cell.title!r} ended with code {by_pipe[pipe].process.exitcode}, perhaps for "
                        f"lack of memory; repeat the command to go on, with fewer --jobs"
                    ) from None
                if isinstance(told, StorageError):
                    raise told
                if isinstance(told, _Outcome):
                    del busy[pipe]
                    give(by_pipe[pipe])
                    yield cell, told.problem
                else:
                    listen(CellProgress(cell, told))
    finally:
        _dismiss(hands)


@final
@dataclass(frozen=True, slots=True)
class _Outcome:
    problem: str | None


def _hire() -> _Hand:
    """Start a process that takes cells from its pipe."""
    # Not forked: threads of torch do not survive that.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, torch.get_num_threads()))
    # What is blocked here stays blocked in the process: the one that asked decides what Ctrl-C means.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    theirs.close()
    return _Hand(process, ours)


def _dismiss(hands: Sequence[_Hand]) -> None:
    """End the processes at once; runs they were at work on stay whole."""
    for hand in hands:
        hand.pipe.close()
        hand.process.terminate()
    for hand in hands:
        hand.process.join(_PATIENCE_SECONDS)
        hand.process.kill()
        hand.process.join()


_PATIENCE_SECONDS = 5


def _leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """End this process as one that is through, which cleans up behind libraries."""
    raise SystemExit


def _serve(pipe: Connection, threads: int) -> None:
    """Run the cells that come through the pipe until it closes."""
    signal.signal(signal.SIGTERM, _leave)
    torch.set_num_threads(threads)  # on which bits depend
    materials = assembly.Materials()

    def tell(what: events.Event | _Outcome | StorageError) -> None:
        try:
            pipe.send(what)
        except OSError:  # who asked is gone; an ordinary exception would pass for a client's failure
            raise SystemExit from None

    with suppress(EOFError, OSError):
        while True:
            values, path = pipe.recv()
            try:
                tell(_Outcome(_attempt(config.parse(values), path, materials, tell)))
            except StorageError as error:
                tell(error)
