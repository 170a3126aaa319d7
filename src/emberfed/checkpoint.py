"""The run folder: whole rounds only, each with checksums; what was finished before a kill is found again.

runs/<name>/
  config.yaml  run.json  partition.json  metrics.jsonl  clients.jsonl  events.jsonl  report.html
  rounds/0002/  state.safetensors  state.json  adapter_config.json  adapter_model.safetensors
                metrics.jsonl  clients.jsonl  clients/<id>.safetensors
  rounds/0003.partial/clients/<id>.safetensors     (a round that is still running)
  final -> rounds/0002                             (once the run is complete)
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, final

from emberfed import storage
from emberfed.errors import RunFolderError
from emberfed.records import Bundle, Json, Payload

_TABLES = ("metrics.jsonl", "clients.jsonl")


@final
@dataclass(frozen=True, slots=True)
class PartialRound:
    """Uploads of a running round, each kept as soon as it is admitted."""

    folder: Path

    def keep(self, client: str, upload: bytes, record: Mapping[str, Json]) -> None:
        """Keep an admitted upload and its line for `clients.jsonl`. Raises: StorageError."""
        storage.put(self._upload(client), upload)
        # The record comes second: it marks the upload as whole, and `kept` checks its digest.
        digest = hashlib.sha256(upload).hexdigest()
        storage.put(self._record(client), storage.encoded({"sha256": digest, "record": dict(record)}))

    def discard(self, client: str) -> None:
        """Forget an upload: its client was quarantined after it. Raises: StorageError."""
        with storage.explained(self._record(client)):
            self._record(client).unlink(missing_ok=True)
            self._upload(client).unlink(missing_ok=True)

    def kept(self) -> dict[str, dict[str, Json]]:
        """Return the records of the uploads that are whole, by client id."""
        records = {}
        for path in sorted((self.folder / "clients").glob("*.json")):
            try:
                entry = json.loads(path.read_bytes())
                if entry["sha256"] == _digest(self._upload(path.stem)):
                    records[path.stem] = entry["record"]
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not whole: the client trains again and gives the same bits
        return records

    def uploads(self, clients: Sequence[str]) -> list[Payload]:
        """Open the uploads of these clients, in the order given; tensors are read only when asked for."""
        return [Payload.open(self._upload(client)) for client in clients]

    def _upload(self, client: str) -> Path:
        return self.folder / "clients" / f"{client}.safetensors"

    def _record(self, client: str) -> Path:
        return self.folder / "clients" / f"{client}.json"


@final
@dataclass(frozen=True, slots=True)
class RunFolder:
    """One run on disk."""

    path: Path

    @staticmethod
    def create(path: Path, config_yaml: str, run: Mapping[str, Json], partition: Mapping[str, Json]) -> RunFolder:
        """Start a run in a folder that is absent or empty. Raises: RunFolderError, StorageError."""
        check_free(path)
        # Under another name first: a start cut short must not block the folder.
        beginning = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            storage.write_json(beginning / "run.json", run)
            storage.write_json(beginning / "partition.json", partition)
            storage.write(beginning / "config.yaml", config_yaml.encode())
            storage.rename(beginning, path)
        finally:
            shutil.rmtree(beginning, ignore_errors=True)
        return RunFolder(path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """Open an existing run. Raises: RunFolderError if there is none."""
        if not (path / "config.yaml").is_file():
            what = "has no config.yaml" if path.exists() else "does not exist"
            raise RunFolderError(f"{path} is not a run folder: it {what}; runs are made by `emberfed run`")
        return RunFolder(path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for one process. Raises: RunFolderError if another one has it."""
        with storage.explained(self.path / ".lock"):
            file = (self.path / ".lock").open("w")
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(f"another process is working on {self.path}; wait for it or stop it") from None
            yield

    def round_path(self, round: int) -> Path:
        """Return the folder of a whole round."""
        return self.path / "rounds" / f"{round:04d}"

    def partial(self, round: int) -> PartialRound:
        """Return the running round."""
        return PartialRound(self.path / "rounds" / f"{round:04d}.partial")

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds that were committed, in order."""
        return sorted(int(path.name) for path in (self.path / "rounds").glob("*") if path.name.isdecimal())

    def commit(
        self,
        round: int,
        state: Bundle,
        exported: Mapping[str, bytes],
        metrics: Sequence[Mapping[str, Json]],
        clients: Sequence[Mapping[str, Json]],
    ) -> None:
        """Make a round whole: it appears under its name only when all of it is on disk. Raises: StorageError."""
        partial = self.partial(round).folder
        files = {
            **exported,
            "state.safetensors": state.to_bytes(),
            "metrics.jsonl": storage.lines(metrics),
            "clients.jsonl": storage.lines(clients),
        }
        for name, data in files.items():
            storage.write(partial / name, data)
        digests = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        storage.write_json(partial / "state.json", {"round": round, "meta": dict(state.meta), "sha256": digests})
        storage.rename(partial, self.round_path(round))
        self.rebuild_tables()

    def drop_uploads(self, round: int) -> None:
        """Remove a whole round's uploads; nothing needs them any more."""
        shutil.rmtree(self.round_path(round) / "clients", ignore_errors=True)

    def finish(self, round: int) -> None:
        """Point `final` at the last round. Raises: StorageError."""
        storage.point(self.path / "final", f"rounds/{round:04d}")

    def latest(self) -> tuple[int, Bundle, list[str]] | None:
        """Return the newest whole round, its state, and what was wrong with newer ones, now set aside.

        None if the run has no round yet. Raises: RunFolderError if it has some and all are damaged.
        """
        problems: list[str] = []
        for round in reversed(self.rounds()):
            folder = self.round_path(round)
            problem = _damage(folder, round)
            if problem is None:
                problems += self.rebuild_tables()
                return round, Bundle.from_bytes((folder / "state.safetensors").read_bytes()), problems
            aside = next(
                candidate
                for number in range(1, 10_000)
                if not (candidate := folder.with_name(f"{folder.name}.damaged-{number}")).exists()
            )
            storage.rename(folder, aside)
            problems.append(f"round {round} is damaged ({problem}); it was set aside as {aside.name}")
        problems = problems or [f"{path.name} is there" for path in (self.path / "rounds").glob("*.damaged-*")]
        if problems:
            raise RunFolderError(f"{self.path} holds no whole round: {'; '.join(problems)}; start the run anew")
        return None

    def rebuild_tables(self) -> list[str]:
        """Write metrics.jsonl and clients.jsonl of the run from those of its rounds; return which could not be read.

        Raises: StorageError.
        """
        problems = []
        for table in _TABLES:
            parts = []
            for round in self.rounds():
                path = self.round_path(round) / table
                try:
                    whole = _digests(path.parent)[table] == _digest(path)
                    parts += [path.read_bytes()] if whole else []
                except (OSError, ValueError, KeyError, TypeError):
                    whole = False
                if not whole:
                    problems.append(f"{table} of round {round} is damaged and left out")
            storage.write(self.path / table, b"".join(parts))
        return problems

    def metrics(self) -> list[dict[str, Json]]:
        """Return the lines of the run's metrics.jsonl. Raises: RunFolderError if it cannot be read."""
        path = self.path / "metrics.jsonl"
        try:
            return [json.loads(line) for line in path.read_bytes().splitlines()]
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{path} cannot be read: {error}") from None

    def log(self, level: str, message: str) -> None:
        """Append to events.jsonl. Raises: StorageError."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        storage.append_line(self.path / "events.jsonl", {"time": now, "level": level, "message": message})

    def read_json(self, name: str) -> Any:
        """Read one of the run's JSON files. Raises: RunFolderError."""
        try:
            return json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{self.path / name} cannot be read: {error}") from None

    def read_object(self, name: str) -> dict[str, Any]:
        """Read one of the run's JSON files that holds an object. Raises: RunFolderError."""
        found = self.read_json(name)
        if not isinstance(found, dict):
            raise RunFolderError(f"{self.path / name} holds no JSON object; the file is damaged")
        return found


_LONGEST_NAME_BYTES = 200


def check_free(path: Path) -> None:
    """Check that a folder may be made at `path`. Raises: RunFolderError if something is there, or no folder can be."""
    if len(path.name.encode()) > _LONGEST_NAME_BYTES or "\0" in str(path):
        raise RunFolderError(
            f"{str(path)[:80]!r}... cannot be a folder: a name has at most {_LONGEST_NAME_BYTES} bytes and no NUL; "
            f"give another --output"
        )
    try:
        holds_run = (path / "config.yaml").exists()
    except OSError as error:
        raise RunFolderError(f"{str(path)[:80]}... cannot be a folder: {error.strerror}") from None
    if holds_run:
        raise RunFolderError(
            f"{path} already holds a run; go on with it (`emberfed resume {path}`), or give another --output"
        )
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise RunFolderError(f"{path} exists and is not an empty folder; give another --output")


def _digests(folder: Path) -> dict[str, str]:
    digests: dict[str, str] = json.loads((folder / "state.json").read_bytes())["sha256"]
    return digests


def _damage(folder: Path, round: int) -> str | None:
    """Return what is wrong with the folder of a round, or None."""
    try:
        digests = _digests(folder)
        written = json.loads((folder / "state.json").read_bytes())["round"]
        if written != round:
            return f"state.json says it is round {written}"
        if "state.safetensors" not in digests:
            return "state.json does not name its files"
        for name, digest in sorted(digests.items()):
            if _digest(folder / name) != digest:
                return f"{name} does not match its checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"state.json cannot be read: {error}"
    return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
