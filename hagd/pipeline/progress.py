"""Progress of stages that Lightning does not run: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

log = logging.getLogger(__name__)

_LINE_SECONDS = 15.0


class StageProgress:
    """Called with (done, total), or (part, done, total), from inside a stage."""

    def __init__(self, stage: str, console: Console) -> None:
        self._stage = stage
        self._console = console
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, float] = {}  # when the part before a part ended
        self._last = self._shown = time.monotonic()

    def __enter__(self) -> StageProgress:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.end()

    def end(self) -> None:
        """Take the bar away, for a training that shows its own: two would write over each other."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __call__(self, done: int, total: int) -> None:
        """Report `done` of `total` units of the stage."""
        self.part(self._stage, done, total)

    def part(self, name: str, done: int, total: int) -> None:
        """Report `done` of `total` units of a named part of the stage."""
        now = time.monotonic()
        rate = done / max(now - self._began.setdefault(name, self._last), 1e-9)
        pace = f"{rate:.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):.1f} s each"
        self._last = now
        if self._bar is not None:
            if name not in self._tasks:
                self._tasks[name] = self._bar.add_task(name, total=total, rate="")
            self._bar.update(self._tasks[name], completed=done, total=total, rate=pace)
        elif now - self._shown > _LINE_SECONDS:
            self._shown = now
            log.info("%s: %d of %d, %s, %.0f s left", name, done, total, pace, (total - done) / max(rate, 1e-9))
