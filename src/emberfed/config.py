"""The configuration of a run: every section belongs to the component that reads it; here they only come together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, final

import yaml
from pydantic import Field

from emberfed.clients import ClientsConfig
from emberfed.clock import ClockConfig
from emberfed.data.config import CorpusConfig
from emberfed.devices import KNOWN
from emberfed.engine import Engine, load_engine
from emberfed.errors import ConfigError, closest, one_of
from emberfed.evaluation import EvaluationConfig
from emberfed.method import Method, load_method
from emberfed.models.config import ModelConfig
from emberfed.sections import Section, override, read_yaml, validate
from emberfed.tasks import Task, load_task, task_names
from emberfed.training import TrainingConfig


class OutputConfig(Section):
    """Where runs go and what they keep.

    Attributes:
        folder: Folder of runs; a run without `--output` gets a free name in it.
        name: The run's name; null: the config file's name.
        keep_uploads: Keep the clients' uploads of finished rounds (they are as large as the adapter, per client).
    """

    folder: str = "runs"
    name: str | None = Field(None, pattern=r"^[\w.-]+$")
    keep_uploads: bool = True


class _Sections(Section):
    """The sections whose shape does not depend on a name, and the others as mappings."""

    seed: int = Field(0, ge=0)
    model: ModelConfig = ModelConfig()
    adapter: dict[str, Any] = Field(default_factory=dict)
    method: dict[str, Any] = Field(default_factory=lambda: {"name": "a3smoe"})
    data: dict[str, Any] = Field(default_factory=dict)
    clients: ClientsConfig
    training: TrainingConfig = TrainingConfig()
    engine: dict[str, Any] = Field(default_factory=lambda: {"name": "local"})
    evaluation: EvaluationConfig = EvaluationConfig()
    clock: ClockConfig = ClockConfig()
    output: OutputConfig = OutputConfig()


@final
@dataclass(frozen=True, slots=True)
class RunConfig:
    """A checked configuration; `yaml()` is its resolved form with every default written out."""

    seed: int
    model: ModelConfig
    method_name: str
    method: Section
    adapter: Section
    data: CorpusConfig
    clients: ClientsConfig
    training: TrainingConfig
    engine_name: str
    engine: Section
    evaluation: EvaluationConfig
    clock: ClockConfig
    output: OutputConfig

    @property
    def method_type(self) -> type[Method]:
        """The method's class."""
        return load_method(self.method_name)

    @property
    def task(self) -> Task:
        """What the model is trained to do."""
        return load_task(self.data.task)

    @property
    def engine_type(self) -> type[Engine]:
        """The engine's class."""
        return load_engine(self.engine_name)

    def values(self) -> dict[str, Any]:
        """Return the resolved configuration as plain values; `parse` gives this configuration back."""
        return {
            "seed": self.seed,
            "model": self.model.model_dump(mode="json"),
            "method": {"name": self.method_name, **self.method.model_dump(mode="json")},
            "adapter": self.adapter.model_dump(mode="json"),
            "data": self.data.model_dump(mode="json"),
            "clients": self.clients.model_dump(mode="json"),
            "training": self.training.model_dump(mode="json"),
            "engine": {"name": self.engine_name, **self.engine.model_dump(mode="json")},
            "evaluation": self.evaluation.model_dump(mode="json"),
            "clock": self.clock.model_dump(mode="json"),
            "output": self.output.model_dump(mode="json"),
        }

    def yaml(self) -> str:
        """Return the resolved configuration as YAML."""
        return yaml.safe_dump(self.values(), sort_keys=False, allow_unicode=True, width=100)


def load(path: Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a configuration file (None: the built-in quickstart) with `--set` overrides. Raises: ConfigError."""
    return parse(override(read_yaml(path or quickstart_path()), overrides))


def quickstart_path() -> Path:
    """Return the path of the built-in quickstart's configuration."""
    return example_path("generation")


def example_path(task: str) -> Path:
    """Return the path of the configuration that comes with the package for a task; the quickstart's is generation.

    Raises: ConfigError listing what exists if the task is unknown.
    """
    if task not in _EXAMPLES:
        raise ConfigError(f"unknown task {task!r}{closest(task, _EXAMPLES)} (there are {one_of(_EXAMPLES)})")
    return Path(str(resources.files("emberfed") / "configs" / _EXAMPLES[task]))


_EXAMPLES = {
    "generation": "quickstart.yaml",
    "image_classification": "images.yaml",
    "text_classification": "texts.yaml",
}


def parse(values: Mapping[str, Any]) -> RunConfig:
    """Check plain values. Raises: ConfigError naming each bad key, the closest allowed one, and what to do."""
    if "methods" in values:
        raise ConfigError("this is an arena, a grid of runs: give it to `emberfed compare`")
    sections = validate(_Sections, values, "")
    _check_evaluated(sections.evaluation, sections.clients)
    _check_clock(sections.clock, sections.clients)
    method_name, method_values = _named(sections.method, "method")
    engine_name, engine_values = _named(sections.engine, "engine")
    method, engine = load_method(method_name), load_engine(engine_name)
    return RunConfig(
        seed=sections.seed,
        model=sections.model,
        method_name=method_name,
        method=validate(method.Config, method_values, "method"),
        adapter=validate(method.AdapterConfig, sections.adapter, "adapter"),
        data=_data(sections.data),
        clients=sections.clients,
        training=sections.training,
        engine_name=engine_name,
        engine=validate(engine.Config, engine_values, "engine"),
        evaluation=sections.evaluation,
        clock=sections.clock,
        output=sections.output,
    )


def _check_evaluated(evaluation: EvaluationConfig, clients: ClientsConfig) -> None:
    """Check that the tiers to evaluate at are there. Raises: ConfigError."""
    names = [tier.name for tier in clients.tiers]
    for name in evaluation.tiers or ():
        if name not in names:
            raise ConfigError(
                f"'evaluation.tiers': no tier is called {name!r}{closest(name, names)} (there are {one_of(names)})"
            )


def _check_clock(clock: ClockConfig, clients: ClientsConfig) -> None:
    """Check that there is a clock where something depends on it. Raises: ConfigError."""
    wanted = [key for key in ("deadline_seconds", "targets") if getattr(clock, key)]
    bare = [tier.name for tier in clients.tiers if tier.device is None]
    if wanted and bare:
        raise ConfigError(
            f"'clock.{wanted[0]}' needs to know how fast clients are, and the tiers {one_of(bare)} have no device; "
            f"give each tier one (clients.tiers, device: there are {one_of(KNOWN)}), or leave the key out"
        )


def _data(section: Mapping[str, Any]) -> CorpusConfig:
    """Check the section of data, whose task says which keys it has. Raises: ConfigError."""
    task = section.get("task", "generation")
    if task not in task_names():
        raise ConfigError(
            f"'data.task': unknown {task!r}{closest(str(task), task_names())} (there are {one_of(task_names())})"
        )
    return validate(load_task(task).Config, {**section, "task": task}, "data")


def _named(section: Mapping[str, Any], where: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(section.get("name"), str):
        raise ConfigError(f"'{where}.name' is missing or not a word; `emberfed methods` lists the names of methods")
    return section["name"], {key: value for key, value in section.items() if key != "name"}
