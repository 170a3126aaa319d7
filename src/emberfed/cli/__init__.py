"""The command line. `main` is the console script `emberfed`; heavy libraries are imported inside the commands."""

from __future__ import annotations

import gc
import io
import os
import sys


def main() -> None:
    """Run the command line and exit."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end a run
    _quiet_libraries()
    from emberfed.cli.app import app

    try:
        app(prog_name="emberfed")
    finally:
        _flush()
        gc.freeze()  # or Python looks at every object of torch's once more before it ends, for seconds


def _quiet_libraries() -> None:
    """Keep progress bars and advice of other libraries out of our output; whoever sets these variables still wins."""
    for name, value in {
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }.items():
        os.environ.setdefault(name, value)


def _flush() -> None:
    """Write what is left; a reader that went away (`| head`) is no error."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
