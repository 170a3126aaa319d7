"""What a client's process tells its SuperNode; a module of its own, since the SuperNode's takes a second to import."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import final


@final
@dataclass(frozen=True, slots=True)
class Order:
    """What a SuperNode is started with.

    Attributes:
        server: `host:port`.
        ca: The certificates that the server's must be signed by; None: plain HTTP.
        key: The file of the node's private key.
        introduced_as: The name to give a server that knows no keys; None: it must know this node's.
        memory: The file that keeps the node's id at the server, and the question it has in hand.
        secret: Who knows it may take tasks; hexadecimal.
        patience_seconds: How long a server that is away is waited for.
    """

    server: str
    ca: str | None
    key: str
    introduced_as: str | None
    memory: str
    secret: str
    patience_seconds: float

    def line(self) -> str:
        """Return the order as what a SuperNode reads."""
        return json.dumps(asdict(self)) + "\n"
