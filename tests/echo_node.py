"""A client's process whose desk gives back what it is sent: `python echo_node.py SERVER CERTIFICATES NAME STATE`.

It adds its process's id. Asked to `grow`, it adds so many bytes; asked to `wait`, it answers after so many seconds;
asked to `fail`, it raises. `-` for CERTIFICATES is none.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from emberfed.flower.node import NodeSettings, serve


class EchoDesk:
    """Answers with the question."""

    def answer(self, content: RecordDict) -> RecordDict:
        """Give it back."""
        asked = content.config_records["asked"]
        if "wait" in asked:
            time.sleep(float(str(asked["wait"])))
        if "fail" in asked:
            raise ValueError(str(asked["fail"]))
        answer = RecordDict({"asked": ConfigRecord({**asked, "pid": os.getpid()})})
        for name, record in content.array_records.items():
            answer[name] = record
        if "grow" in asked:
            data = os.urandom(int(str(asked["grow"])))
            answer["grown"] = ArrayRecord({"grown": Array("uint8", (len(data),), "bytes", data)})
        return answer

    def rest(self) -> None:
        """Rest."""


if __name__ == "__main__":
    server, certificates, name, state = sys.argv[1:]
    folder = None if certificates == "-" else Path(certificates)
    serve(
        NodeSettings(server, folder, name, Path(state), patience_seconds=60.0),
        EchoDesk(),
        lambda event: print(event, flush=True),
    )
