"""`server` and `client`: the two sides of a deployment."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, final

from emberfed import events
from emberfed.cli.progress import Plan, display
from emberfed.cli.stopping import Stop, resumable
from emberfed.cli.summary import Summary, summarise
from emberfed.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType


def serve(
    source: Path | None,
    overrides: Sequence[str],
    *,
    output: Path,
    state: Path,
    certificates: Path | None,
    insecure: bool,
) -> Summary:
    """Run a federation with clients on other machines, or go on with one. Raises: EmberfedError."""
    deploy = _deploy()
    _check_choice(certificates, insecure, "emberfed certificates DIR --server HOST --client NAME")
    checked = deploy.configuration(source, overrides)
    stop = Stop()
    with resumable(output, "the same command"), stop.on_signals(), display(Plan.of(checked)) as shown:
        listen = stop.before(shown)
        deploy.serve(checked, output=output, state=state, certificates=certificates, listen=listen)
    return summarise(output)


def join(
    source: Path | None,
    overrides: Sequence[str],
    *,
    data: Path,
    server: str,
    name: str | None,
    tier: str | None,
    state: Path | None,
    certificates: Path | None,
    insecure: bool,
    patience_seconds: float,
) -> None:
    """Take part in a federation until stopped. Raises: EmberfedError."""
    deploy = _deploy()
    _check_choice(certificates, insecure, "the folder that the server's keeper made for this client")
    checked = deploy.configuration(source, overrides)
    if name is None and certificates is None:
        raise ConfigError("without certificates the server knows this client by no key: say who it is with --name")
    known = name if name is not None else Path(str(certificates)).absolute().name
    tiers = [one.name for one in checked.clients.tiers]
    if tier is None and len(tiers) > 1:
        raise ConfigError(
            f"--tier is missing; there are {', '.join(tiers)}. `emberfed doctor CONFIG --measure` says which of them "
            f"this machine can afford"
        )
    client = deploy.ClientSettings(
        name=known,
        tier=tiers[0] if tier is None else tier,
        data=data,
        state=(Path(f"emberfed-client-{known}") if state is None else state).absolute(),
    )
    stop = Stop()
    with stop.on_signals():
        deploy.join(
            checked,
            client,
            server=server,
            certificates=certificates,
            patience_seconds=patience_seconds,
            listen=stop.before(_ClientLines()),
        )


def _deploy() -> ModuleType:
    """Return what deployments need. Raises: ConfigError if the extra is not installed."""
    try:
        from emberfed import deploy
    except ModuleNotFoundError as missing:
        raise ConfigError(f"deployments need {missing.name}: pip install 'emberfed[flower]'") from missing
    return deploy


def _check_choice(certificates: Path | None, insecure: bool, where_from: str) -> None:
    if (certificates is None) != insecure:
        raise ConfigError(
            f"give --certificates DIR ({where_from}), or --insecure: then nothing is encrypted and anybody may join"
            if certificates is None
            else "give --certificates or --insecure, not both"
        )


@final
class _ClientLines:
    """One plain line for whatever a client's keeper may want to know, on standard error."""

    def __init__(self) -> None:
        self._step: events.Step | None = None

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.Step):
            self._step = event
        elif isinstance(event, events.ClientDone):
            step, self._step = self._step, None
            trained = "" if step is None else f" ({step.steps} steps, loss {step.loss:.2f})"
            self._print(f"round {event.round}: {event.problem or f'done{trained}'}")
        elif isinstance(event, events.Notice):
            self._print(event.message if event.level == "info" else f"{event.level}: {event.message}")

    def _print(self, line: str) -> None:
        print(" ".join(line.split()), file=sys.stderr, flush=True)
