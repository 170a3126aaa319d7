"""Write docs/configuration.md from the docstrings of the sections: `python docs/make_configuration.py`."""

from __future__ import annotations

from pathlib import Path

import yaml

from emberfed.cli.options import options, summary_line
from emberfed.clients import ClientsConfig, Tier
from emberfed.clock import ClockConfig, ServerClock
from emberfed.config import OutputConfig
from emberfed.data.config import (
    DirichletPartition,
    IidPartition,
    LabelPartition,
    NaturalPartition,
    ShardsPartition,
    SizePartition,
)
from emberfed.devices import Device
from emberfed.engine import engine_names, load_engine
from emberfed.evaluation import EvaluationConfig
from emberfed.method import load_method, method_names
from emberfed.models.config import ModelConfig
from emberfed.sections import Section
from emberfed.server_optimizer import ServerOptimizerConfig
from emberfed.tasks import load_task, task_names
from emberfed.training import TrainingConfig

HEAD = """\
# Configuration

YAML with the sections below; every key may be left out unless it is marked *required*. Unknown keys are errors that
name the closest one. `--set section.key=value` changes one key on the command line, `emberfed init` writes a file with
all of them, and each run keeps its resolved configuration as `config.yaml`. `seed` (0) stands outside the sections:
same seed, same bits.

This page is made from the docstrings by `python docs/make_configuration.py`.
"""


def page() -> str:
    """Return the page."""
    partitions = (IidPartition, DirichletPartition, LabelPartition, ShardsPartition, NaturalPartition, SizePartition)
    methods = [(name, load_method(name)) for name in method_names()]
    parts = [
        HEAD,
        table("model", ModelConfig),
        *(table(f"method: {{name: {name}}}", method.Config) for name, method in methods),
        table("method.server_optimizer", ServerOptimizerConfig),
        *(table(f"adapter (method {', '.join(names)})", section) for section, names in _adapters().items()),
        *(table(f"data: {{task: {name}}}", load_task(name).Config) for name in task_names()),
        *(table(f"data.partition: {kind.__name__.removesuffix('Partition').lower()}", kind) for kind in partitions),
        table("clients", ClientsConfig),
        table("clients.tiers, each", Tier),
        table("clients.tiers.device", Device),
        table("training", TrainingConfig),
        *(table(f"engine: {{name: {name}}}", load_engine(name).Config) for name in engine_names()),
        table("evaluation", EvaluationConfig),
        table("clock", ClockConfig),
        table("clock.server", ServerClock),
        table("output", OutputConfig),
    ]
    return "\n".join(parts)


def _adapters() -> dict[type[Section], list[str]]:
    """Return the kinds of adapter section, and the methods that have each."""
    kinds: dict[type[Section], list[str]] = {}
    for name in method_names():
        kinds.setdefault(load_method(name).AdapterConfig, []).append(name)
    return kinds


def table(title: str, section: type[Section]) -> str:
    """Return one section as a Markdown table."""
    lines = [f"## {title}\n", f"{summary_line(section)}\n"]
    found = options(section)
    if found:
        lines += ["| key | kind | default | |", "|---|---|---|---|"]
    for option in found:
        default = "*required*" if option.required else f"`{shown(option.default)}`"
        lines.append(f"| `{option.name}` | {option.kind.replace('|', 'or')} | {default} | {option.help} |")
    return "\n".join(lines) + "\n"


def shown(value: object) -> str:
    """Return a default as it would stand in YAML."""
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    (Path(__file__).parent / "configuration.md").write_text(page(), encoding="utf-8")
