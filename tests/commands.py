"""Calls of the command line, inside this process and as processes of their own, for its tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from click.testing import Result
from typer.testing import CliRunner

from emberfed.cli.app import app


def invoke(*arguments: str | Path) -> Result:
    """Carry out a command in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Start a command as a process, with pipes to read."""
    command = [sys.executable, "-m", "emberfed", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_config(path: Path, values: dict[str, Any]) -> Path:
    """Write a configuration file and return its path."""
    path.write_text(yaml.safe_dump(values))
    return path
