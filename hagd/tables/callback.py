"""The Hydra callback that makes an experiment a table."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from hagd.cli.sweep_end import AtSweepEnd


class WriteTable(AtSweepEnd):
    """Prints and writes the table at the end of its sweep.

    Its keys in the experiment, which `load_table` reads, are those of `hagd.tables.definition.TableSpec`.
    """

    def __init__(self, **_: Any) -> None:
        pass

    def sweep_ended(self, config: DictConfig) -> None:
        from rich.console import Console

        from hagd.tables.command import show

        show(str(config.hydra.runtime.choices.experiment), config.hydra.overrides.task, None, Console())
