"""Clients without a model for tests of engines with processes: they do what the download tells them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, final

import torch

from emberfed.errors import ModelError, StorageError
from emberfed.records import ClientFailed, Job, Question, Reply

_LONGEST_SECONDS = 300


def wait_for(path: Path) -> None:
    """Wait until a file is there; whoever waits too long fails."""
    end = time.monotonic() + _LONGEST_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError(f"{path} never came")
        time.sleep(0.005)


def job(client: str, told: str = "", round: int = 1) -> Job:
    """A question whose download tells the client what to do; the word that follows is what to do when idle."""
    return Job(round, client, told.encode())


@final
class Clerk:
    """Clients that answer with the number of their process, and what it computes with."""

    def __init__(self, folder: Path, device: str) -> None:
        self._folder = folder
        self._device = device

    def answer(self, question: Question, /) -> Reply | ClientFailed:
        told, _, name = question.download.decode().partition(" ")
        here = self._folder / (name or question.client)
        if told == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if told == "exit":
            os._exit(3)
        if told == "bug":
            raise KeyError("a mistake in the clients")
        if told == "full":
            raise StorageError("could not write: the disk is full; make room")
        if told == "fail":
            return ClientFailed(question.round, question.client, "not today")
        if told == "wait":
            (self._folder / f"{question.client} waits").touch()
            wait_for(here)
        if told == "alone":
            here.touch(exist_ok=False)
            time.sleep(0.02)
            here.unlink()
        measured = {"pid": float(os.getpid()), "threads": float(torch.get_num_threads())}
        return Reply(question.round, question.client, f"{question.client} {self._device}".encode(), measured)

    def idle(self, question: Question, /) -> float:
        """Do what the client's name tells; note who was idle."""
        assert question.download == b""
        told, _, name = question.client.partition(" ")
        if told == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if told == "full":
            raise StorageError("could not write: the disk is full; make room")
        if told == "wait":
            wait_for(self._folder / name)
        (self._folder / f"{question.client} idled").touch()
        return 0.25


@final
@dataclass(frozen=True)
class Desk:
    """A recipe for clerks, which may fail."""

    folder: Path
    trouble: Literal["", "model", "bug", "die", "second"] = ""
    device: str = "anywhere"

    @contextmanager
    def open(self) -> Iterator[Clerk]:
        """Note the process, and be in trouble if told so."""
        (self.folder / f"opened by {os.getpid()}").touch()
        if self.trouble == "model":
            raise ModelError("model folder /nowhere does not exist; give a local folder")
        if self.trouble == "bug":
            raise KeyError("a mistake in the recipe")
        if self.trouble == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        yield Clerk(self.folder, self.device)

    def on(self, device: str) -> Desk:
        """Be somewhere."""
        return replace(self, device=device)
