"""A client of a federation whose desk gives questions back: a process of its own for tests.

Run as `python flower_echo.py SERVER CERTIFICATES STATE NAME PATIENCE_SECONDS`, CERTIFICATES being a folder, or - for
none. What happens is written to its standard output, a line each.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import final

from flwr.app import RecordDict

from emberfed.cli.stopping import Stop
from emberfed.errors import EmberfedError
from emberfed.flower.node import NodeSettings, serve


@final
class Echo:
    """Does what a question's record `do` says, and gives the question back."""

    def answer(self, content: RecordDict) -> RecordDict:
        do = content.config_records["do"]
        what = do["what"]
        print("asked", what, flush=True)
        if what == "fail":
            raise ValueError("as asked")
        if what == "wait":
            time.sleep(float(str(do["seconds"])))
        return content

    def rest(self) -> None:
        print("rested", flush=True)


def main(server: str, certificates: str, state: str, name: str, patience_seconds: str) -> int:
    folder = None if certificates == "-" else Path(certificates)
    settings = NodeSettings(server, folder, name, Path(state), float(patience_seconds))
    try:
        with Stop().on_signals():
            serve(settings, Echo(), lambda event: print(event, flush=True))
    except EmberfedError as error:
        print(f"error: {type(error).__name__}: {error}", flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        print("stopped", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
