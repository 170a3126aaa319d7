"""The environment that Flower's code runs in: no telemetry, no question about updates, nothing installed by it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

QUIET: Mapping[str, str] = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
_PROXIES = ("http_proxy", "https_proxy", "all_proxy")


def environment(home: Path) -> dict[str, str]:
    """Return the environment for a process that runs Flower's code.

    Proxies are left out: what a client dials is the server itself, and a local port is nobody else's.

    Args:
        home: Where Flower may keep files of its own; it would take the user's home folder.
    """
    own = {name: value for name, value in os.environ.items() if name.lower() not in _PROXIES}
    return {**own, **QUIET, "FLWR_HOME": str(home)}
