"""Progress of a training: a bar on a terminal, a line now and then in a log; metrics to the loggers.

A training step returns a dict with `loss` and any further scalars; they are read here at intervals only,
because reading a scalar off an accelerator waits for it, and Lightning's `self.log` costs as much as a small step.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

log = logging.getLogger(__name__)

BAR_SECONDS = 0.25
"""Between two updates of the bar."""

JOIN = "of_all_processes"
"""Method of a module whose processes train parts of their own: metrics of one process's step by name, to those of the
whole. It is called in every process whenever metrics are logged; what is shown is the first process's."""


class TrainingProgress(Callback):
    """Shows steps, rate, time left and chosen metrics; sends every metric to the loggers.

    Args:
        stage: what is trained, first word of every line and prefix of every logged metric.
        metrics: names in the training step's dict that are shown.
        tokens: a step's, if the rate is to be shown in tokens a second; it is logged then, too. Peak memory always is.
        seconds: between two lines where there is no terminal.
        log_every: steps between two records to the loggers.
        console: where the bar goes (standard error).
    """

    def __init__(
        self,
        stage: str,
        metrics: tuple[str, ...] = ("loss",),
        tokens: int | None = None,
        seconds: float = 15.0,
        log_every: int = 50,
        console: Console | None = None,
    ) -> None:
        self.stage = stage
        self.metrics = metrics
        self.tokens = tokens
        self.seconds = seconds
        self.log_every = log_every
        self.console = console or Console(stderr=True)
        self._bar: Progress | None = None
        self._shown_at = self._began_at = 0.0
        self._began = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began, self._began_at = trainer.global_step, time.monotonic()
        self._shown_at = self._began_at
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[metrics]}"),
            )
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._bar.add_task(self.stage, total=trainer.max_steps, completed=self._began, rate="", metrics="")
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        last = step == trainer.max_steps
        if step % self.log_every == 0 or last:
            self._log(trainer, pl_module, outputs)
        now = time.monotonic()
        if trainer.is_global_zero and (last or now - self._shown_at >= (BAR_SECONDS if self._bar else self.seconds)):
            self._shown_at = now
            self._show(step, trainer.max_steps, outputs, now)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _log(self, trainer: Trainer, module: LightningModule, outputs: dict[str, Any]) -> None:
        join = getattr(module, JOIN, None)
        if not trainer.loggers and join is None:
            return
        values = _scalars(outputs, getattr(module, "parts", ()))
        if join is not None:  # also where there are no loggers: the process that has some waits for the others
            values = join(values)
        values["memory_mb"] = _peak_mb(trainer)
        if self.tokens is not None:
            values["tokens_per_second"] = self.tokens * self._rate(trainer.global_step, time.monotonic())
        for logger in trainer.loggers:
            logger.log_metrics({f"{self.stage}/{name}": value for name, value in values.items()}, trainer.global_step)

    def _show(self, step: int, n_steps: int, outputs: dict[str, Any], now: float) -> None:
        rate = self._rate(step, now)
        pace = f"{rate:.1f}/s" if self.tokens is None else f"{rate * self.tokens:,.0f} tokens/s"
        values = " ".join(f"{name} {float(outputs[name]):.4g}" for name in self.metrics if name in outputs)
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=step, rate=pace, metrics=values)
        else:
            left = _clock((n_steps - step) / max(rate, 1e-9))
            log.info("%s: step %d of %d, %s, %s left, %s", self.stage, step, n_steps, pace, left, values)

    def _rate(self, step: int, now: float) -> float:
        """Steps a second."""
        return (step - self._began) / max(now - self._began_at, 1e-9)

    def _close(self) -> None:
        if self._bar:
            self._bar.stop()
            self._bar = None


def _clock(seconds: float) -> str:
    """Hours, of any number, minutes and seconds, as on the bar."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{rest:02d}"


def _scalars(outputs: dict[str, Any], parts: Sequence[str]) -> dict[str, float]:
    """What a step returned by name of the metric; one metric a part for what it returned of each part."""
    found: dict[str, float] = {}
    for name, value in outputs.items():
        if getattr(value, "ndim", 0):
            found |= {f"{name}/{part}": float(one) for part, one in zip(parts, value, strict=True)}
        else:
            found[name] = float(value)
    return found


def _peak_mb(trainer: Trainer) -> float:
    """Largest memory so far: of the accelerator, else resident of this process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
