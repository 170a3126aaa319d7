"""emberfed: federated fine-tuning of sparse mixture-of-experts models.

Every client holds the whole adapter and activates as many experts as it can afford.

    import emberfed
    run = emberfed.run("config.yaml")          # or a mapping; nothing: the built-in quickstart
    run.metrics(), run.path

Names are imported when first used, so that `import emberfed` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from emberfed.aggregation import Update, redistribute
    from emberfed.api import Run, evaluate, export, resume, run
    from emberfed.arena import compare
    from emberfed.engine import load_engine
    from emberfed.errors import EmberfedError
    from emberfed.method import Method, aggregate, load_method
    from emberfed.models.sparse_adapter_files import load_adapter

_HOMES = {
    "EmberfedError": "errors",
    "Method": "method",
    "Run": "api",
    "Update": "aggregation",
    "aggregate": "method",
    "compare": "arena",
    "evaluate": "api",
    "export": "api",
    "load_adapter": "models.sparse_adapter_files",
    "load_engine": "engine",
    "load_method": "method",
    "redistribute": "aggregation",
    "resume": "api",
    "run": "api",
}

__all__ = [
    "EmberfedError",
    "Method",
    "Run",
    "Update",
    "__version__",
    "aggregate",
    "compare",
    "evaluate",
    "export",
    "load_adapter",
    "load_engine",
    "load_method",
    "redistribute",
    "resume",
    "run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'emberfed' has no attribute {name!r}")
    return getattr(importlib.import_module(f"emberfed.{_HOMES[name]}"), name)
