"""Find what a package holds by its file names: `methods/`, `engines/`. Adding a file adds a name."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import TypeVar

from emberfed.errors import ConfigError, closest, one_of

T = TypeVar("T")


def names(package: str) -> list[str]:
    """Return the sorted names of the modules in `package` (a dotted name), without importing them."""
    path = importlib.import_module(package).__path__
    return sorted(module.name for module in pkgutil.iter_modules(path) if not module.name.startswith("_"))


def load(package: str, name: str, base: type[T]) -> type[T]:
    """Return the one concrete subclass of `base` that the module `package.name` defines.

    Raises:
        ConfigError: if there is no such module; the error lists what exists.
        TypeError: if the module does not define exactly one such class (a bug in that file).
    """
    existing = names(package)
    what = package.rpartition(".")[2].removesuffix("s")
    if name not in existing:
        raise ConfigError(f"unknown {what} {name!r}{closest(str(name), existing)} (there are {one_of(existing)})")
    module = importlib.import_module(f"{package}.{name}")
    found = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
    ]
    if len(found) != 1:
        raise TypeError(f"{module.__name__} must define exactly one concrete {base.__name__}, found {len(found)}")
    return found[0]
