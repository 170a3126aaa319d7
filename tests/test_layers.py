"""Imports only point down: a module may import from its own layer or a lower one, and methods never each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import emberfed

ROOT = Path(emberfed.__file__).parent

LAYERS = {
    0: {"", "errors", "seeds", "sections", "records", "events", "plugins", "storage", "metrics", "devices"},
    1: {
        "models",
        "data",
        "builtin",
        "clients",
        "penalties",
        "server_optimizer",
        "factors",
        "aggregation",
        "expert_roles",
    },
    2: {"costs", "memory", "clock", "traffic", "speed", "training", "evaluation", "tasks", "own_data"},
    3: {
        "method",
        "engine",
        "methods",
        "federated",
        "federated_lora",
        "federated_adapter",
        "averaged_lora",
        "federated_experts",
        "compact_session",
    },
    4: {
        "admission",
        "checkpoint",
        "inbox",
        "personal",
        "surveys",
        "worker",
        "rounds",
        "config",
        "material",
        "provenance",
        "own_data",
        "handshake",
        "deployment",
        "assembly",
        "flower",
        "processes",
        "report",
        "tier_choice",
        "engines",
    },
    5: {"api", "arena", "deploy"},
    6: {"cli", "__main__"},
}
LAYER_OF = {name: layer for layer, names in LAYERS.items() for name in names}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def top(dotted: str) -> str:
    """The part of `emberfed.x.y` that has a layer: x; empty for the package itself."""
    return dotted.split(".")[1] if "." in dotted else ""


def imported(path: Path) -> Iterator[str]:
    """Dotted names of emberfed that a file imports at run time (also inside functions)."""
    tree = ast.parse(path.read_text())
    for branch in [node for node in ast.walk(tree) if isinstance(node, ast.If)]:
        if ast.unparse(branch.test) == "TYPE_CHECKING":
            branch.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "emberfed")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "emberfed":
                yield from (f"emberfed.{alias.name}" if alias.name in LAYER_OF else "emberfed" for alias in node.names)
            elif node.module and node.module.startswith("emberfed."):
                yield node.module


def name_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    return "" if relative == Path("__init__.py") else relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert name_of(path) in LAYER_OF, f"give {name_of(path)!r} a layer here and in ARCHITECTURE.md"
    own = LAYER_OF[name_of(path)]
    for dotted in imported(path):
        assert LAYER_OF[top(dotted)] <= own, (
            f"{path.name} (layer {own}) imports {dotted} (layer {LAYER_OF[top(dotted)]})"
        )


@pytest.mark.parametrize("package", ["methods", "engines"])
def test_plug_ins_do_not_import_each_other(package: str) -> None:
    for path in (ROOT / package).glob("*.py"):
        assert not [name for name in imported(path) if name.startswith(f"emberfed.{package}")], path


def test_only_one_module_knows_peft_s_layout() -> None:
    knowing = {path.stem for path in modules() if "adapter_config" in path.read_text() and path.parent.name == "models"}
    assert knowing == {"peft_layout"}


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_flower_is_known_to_its_package_alone(path: Path) -> None:
    named = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    inside = path.is_relative_to(ROOT / "flower")
    assert inside or not named & {"flwr", "ray"}, path
