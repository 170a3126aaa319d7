"""A client's last answers, on its disk: what it finished is not done again because a reply was lost on its way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import final

from emberfed import storage
from emberfed.records import Json, Question, Reply


@final
class LastAnswers:
    """The last answer of each kind (training, assessment, survey) in one run."""

    def __init__(self, folder: Path) -> None:
        """Keep them in `folder`."""
        self._folder = folder

    def find(self, question: Question, tier: str) -> Reply | None:
        """Return the answer that was given to the same question; None if it was another, or the file is damaged."""
        upload, told = self._files(question)
        try:
            known = json.loads(told.read_bytes())
            if known["question"] != _address(question, tier):
                return None
            data = upload.read_bytes()
            if known["sha256"] != hashlib.sha256(data).hexdigest():
                return None
            return Reply(question.round, question.client, data, dict(known["measured"]))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def keep(self, question: Question, tier: str, reply: Reply) -> None:
        """Keep an answer in the place of the one before. Raises: StorageError."""
        upload, told = self._files(question)
        storage.write(upload, reply.upload)
        known = {
            "question": _address(question, tier),
            "measured": dict(reply.measured),
            "sha256": hashlib.sha256(reply.upload).hexdigest(),
        }
        storage.write_json(told, known)

    def _files(self, question: Question) -> tuple[Path, Path]:
        kind = type(question).__name__.lower()
        return self._folder / f"{kind}.safetensors", self._folder / f"{kind}.json"


def _address(question: Question, tier: str) -> dict[str, Json]:
    """Return what tells one question from another."""
    download = hashlib.sha256(question.download).hexdigest()
    return {"round": question.round, "client": question.client, "tier": tier, "download": download}
