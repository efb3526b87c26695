"""What is done when the jobs of a sweep have ended, however they ended."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from hagd.cli.sweep_jobs import read_jobs

_DUE: list[tuple[AtSweepEnd, DictConfig]] = []


class AtSweepEnd(Callback, ABC):
    """Something that `sweep_ends` does after a sweep of which a job has started.

    Hydra skips `on_multirun_end` when a job failed or the sweep is interrupted; and when the process exits, W&B has
    stopped already.
    """

    @abstractmethod
    def sweep_ended(self, config: DictConfig) -> None:
        """What is done; `config` is the configuration of the sweep, `hydra` included."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _DUE.append((self, config))


@contextmanager
def sweep_ends() -> Iterator[None]:
    """Do what is due when the block, in which Hydra runs, has ended: the last that became due first."""
    _DUE.clear()
    try:
        yield
    finally:
        with ExitStack() as stack:
            for each, config in _DUE:
                stack.callback(_do, each, config)


def _do(due: AtSweepEnd, config: DictConfig) -> None:
    try:
        if read_jobs(Path(str(config.hydra.sweep.dir))):  # else Hydra prints why the sweep failed
            due.sweep_ended(config)
    except Exception as error:  # how the sweep ended counts, whatever goes wrong with what is told about it
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr)
