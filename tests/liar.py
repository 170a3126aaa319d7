"""A client without model and data that describes itself wrongly: `python liar.py SERVER CERTIFICATES STATE NAME LIE`.

What it should have, it takes from the server's own question.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, final

from flwr.app import ConfigRecord, RecordDict

from emberfed.flower.node import NodeSettings, serve

LIES: dict[str, dict[str, Any]] = {
    "tier": {"tier": "giant"},
    "name": {"client": "c0"},
    "negative": {"counts": {"examples": -5}},
    "own": {"own": {"emberfed": "0.0.0"}},
    "pages": {"problem": "\n\x1b[31mred\x1b[0m" * 50_000},
}


@final
class Liar:
    """Answers whatever it is asked with a description of itself."""

    def __init__(self, name: str, lie: str) -> None:
        self._name = name
        self._lie = lie

    def answer(self, content: RecordDict) -> RecordDict:
        """Lie."""
        if self._lie == "no message":
            return RecordDict({"parameters": ConfigRecord({"loss": 0.5})})
        own = json.loads(str(content.config_records["emberfed"]["body"]))
        told = {"own": own, "client": self._name, "tier": "small", "counts": {"examples": 5}, **LIES[self._lie]}
        return RecordDict({"emberfed": ConfigRecord({"kind": "description", "body": json.dumps(told)})})

    def rest(self) -> None:
        """Rest."""


if __name__ == "__main__":
    server, certificates, state, name, lie = sys.argv[1:]
    serve(NodeSettings(server, Path(certificates), name, Path(state), 60.0), Liar(name, lie), print)
