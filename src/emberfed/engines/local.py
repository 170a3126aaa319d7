"""The default engine: one process, one client after the other, one base model in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import final

from emberfed.engine import Engine
from emberfed.records import Assessment, ClientFailed, Job, Reply
from emberfed.sections import Section


class LocalConfig(Section):
    """The local engine has no options."""


@final
class LocalEngine(Engine):
    """Runs jobs here, in the order they come."""

    Config = LocalConfig

    def map(self, jobs: Iterable[Job | Assessment]) -> Iterator[Reply | ClientFailed]:
        """Run the jobs one by one."""
        for job in jobs:
            yield self.answer(job)
