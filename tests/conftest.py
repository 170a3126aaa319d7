"""Fixtures that several test files use."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from builders import save_tiny_model
from federations import write_records

# Machines are noisy, so nothing is timed; examples are the same on every run, so that a failure can be looked at.
hypothesis.settings.register_profile("emberfed", deadline=None, derandomize=True)
hypothesis.settings.load_profile("emberfed")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; tests that ask for it are skipped where it is absent."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the real data of ../shared/data, which is not part of the repository")
    return folder


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random OLMoE with its tokenizer, as `save_pretrained` writes it. Do not write to it."""
    return save_tiny_model(tmp_path_factory.mktemp("tiny-olmoe"))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Instruction records as JSONL, in three categories. Do not write to it."""
    return write_records(tmp_path_factory.mktemp("tiny-data") / "data.jsonl")
