"""What a client does with a job: the same code in every engine, one base model per process."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import final

from emberfed import costs, storage
from emberfed.clients import Client
from emberfed.data.shard import Shard
from emberfed.errors import EmberfedError, RunFolderError, StorageError
from emberfed.evaluation import Score, Scores
from emberfed.method import Method
from emberfed.models.foundation_model import FoundationModel
from emberfed.models.shared_weights import share_weights
from emberfed.records import SCORES, Assessment, Bundle, ClientFailed, Job, Payload, Question, Reply, Survey
from emberfed.seeds import Seeds

_LONGEST_REASON = 500


@final
class MemoryFolder:
    """Each client's own memory, on its own disk, kept by round so that a repeated round starts from the same one."""

    def __init__(self, folder: Path) -> None:
        """Keep memories below `folder`."""
        self._folder = folder

    def read(self, client: str, before_round: int) -> Bundle:
        """Return what the client kept from its latest round before `before_round`; empty if there is none.

        Raises: RunFolderError if it is damaged.
        """
        earlier = [path for path in self._kept(client) if int(path.stem) < before_round]
        if not earlier:
            return Bundle()
        try:
            return Bundle.from_bytes(max(earlier).read_bytes())
        except (RunFolderError, OSError) as error:
            raise RunFolderError(
                f"memory {max(earlier)} is damaged ({error}); put it back, or remove the client's memory, and the "
                f"client begins anew"
            ) from None

    def write(self, client: str, round: int, memory: Bundle) -> None:
        """Keep the client's memory of a round; drop those that no repeat or fall-back can need any more."""
        if not (memory.tensors or memory.meta):
            return
        storage.write(self._folder / client / f"{round:06d}.safetensors", memory.to_bytes())
        for path in sorted(self._kept(client))[:-3]:
            path.unlink()

    def _kept(self, client: str) -> list[Path]:
        """Return the memories of a client, and no other file that lies there."""
        return [path for path in (self._folder / client).glob("*.safetensors") if path.stem.isdecimal()]


@final
class Worker:
    """Runs jobs for the clients whose data it holds."""

    def __init__(
        self,
        method: Method,
        model: FoundationModel,
        clients: Mapping[str, Client],
        shards: Callable[[str], Shard],
        memory: MemoryFolder,
        seeds: Seeds,
        assess: Callable[[str, FoundationModel], Scores[Score]],
    ) -> None:
        """Take what a client works with.

        Args:
            method: The method.
            model: The base model.
            clients: By id.
            shards: Gives what a client trains on.
            memory: What clients keep.
            seeds: The run's.
            assess: Scores a model on what a client keeps from training.
        """
        self._method = method
        self._model = model
        self._clients = clients
        self._shards = shards
        self._memory = memory
        self._seeds = seeds
        self._assess = assess

    def share_weights(self, file: int) -> None:
        """Let the model's frozen weights lie in a file, given by its descriptor, that several processes map.

        Raises: StorageError.
        """
        share_weights(self._model.lm, file)

    def answer(self, question: Question) -> Reply | ClientFailed:
        """Answer; whatever goes wrong on the client becomes a value, except a full disk, which stops the run."""
        try:
            if isinstance(question, Job):
                return self.run(question)
            return self.assess(question) if isinstance(question, Assessment) else self.survey(question)
        except StorageError:
            raise
        except EmberfedError as error:
            return ClientFailed(question.round, question.client, str(error))
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(frame.filename).name}:{frame.lineno}"
            what = " ".join(str(error).split())[:_LONGEST_REASON]  # libraries write stack traces into theirs
            return ClientFailed(question.round, question.client, f"{type(error).__name__} at {where}: {what}")

    def idle(self, question: Question) -> float:
        """Let the client do what it does after training, while the server goes on, if the method has such work.

        A client that cannot will say so when it is asked to train again, where the same work is then done.

        Returns: Seconds it worked, 0 if there was nothing to do. Raises: StorageError.
        """
        if not (self._method.idles and isinstance(question, Job)):
            return 0.0
        started = time.perf_counter()
        try:
            memory = self._memory.read(question.client, question.round + 1)
            settled = self._settled(self._clients[question.client], memory)
        except StorageError:
            raise
        except Exception:
            return time.perf_counter() - started
        if settled is memory:
            return 0.0
        self._memory.write(question.client, question.round, settled)
        return time.perf_counter() - started

    def run(self, job: Job) -> Reply:
        """Train one client for one round. Raises: ClientError, or whatever the method raises."""
        started = time.perf_counter()
        download = Payload.from_bytes(job.download)
        client = self._clients[job.client]
        seeds = self._seeds.at(round=job.round, client=job.client)
        with costs.measuring(self._model.device) as peak:
            memory = self._settled(client, self._memory.read(client.id, job.round))
            result = self._method.fit(self._model, download, client, self._shards(client.id), memory, seeds)
            upload = Payload(job.round, client.id, result.upload).to_bytes()
        self._memory.write(client.id, job.round, result.memory)
        measured = {"seconds": time.perf_counter() - started, "peak_memory_bytes": float(peak.bytes)}
        return Reply(job.round, client.id, upload, measured)

    def survey(self, question: Survey) -> Reply:
        """Describe the client's data to the server. Raises: ClientError, or whatever the method raises."""
        started = time.perf_counter()
        client = self._clients[question.client]
        seeds = self._seeds.at(round=question.round, client=question.client)
        with costs.measuring(self._model.device) as peak:
            memory = self._memory.read(client.id, question.round)
            result = self._method.survey(self._model, client, self._shards(client.id), memory, seeds)
            answer = Payload(question.round, client.id, result.upload).to_bytes()
        self._memory.write(client.id, question.round - 1, result.memory)
        measured = {"seconds": time.perf_counter() - started, "peak_memory_bytes": float(peak.bytes)}
        return Reply(question.round, client.id, answer, measured)

    def assess(self, job: Assessment) -> Reply:
        """Score the client's own model on its own data. Raises: ClientError, or whatever the method raises."""
        started = time.perf_counter()
        download = Payload.from_bytes(job.download)
        client = self._clients[job.client]
        memory = self._settled(client, self._memory.read(client.id, job.round))
        with self._method.personal(self._model, download, client, memory) as model:
            scores = self._assess(client.id, model)
        answer = Payload(job.round, client.id, Bundle(meta={SCORES: scores.overall.json()})).to_bytes()
        return Reply(job.round, client.id, answer, {"seconds": time.perf_counter() - started})

    def _settled(self, client: Client, memory: Bundle) -> Bundle:
        """Return what the client kept, its idle work done if it was cut short; the same object if there is none."""
        if not (self._method.idles and (memory.tensors or memory.meta)):
            return memory
        return self._method.idle(self._model, client, self._shards(client.id), memory)
