"""The Hydra callback that makes an experiment a table."""

from __future__ import annotations

from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class WriteTable(Callback):
    """Prints and writes the table at the end of its sweep.

    Its keys in the experiment, which `load_table` reads, are those of `hagd.tables.definition.TableSpec`.
    """

    def __init__(self, **_: Any) -> None:
        pass

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from rich.console import Console

        from hagd.tables.command import show

        sweep = GlobalHydra.instance().hydra
        GlobalHydra.instance().clear()  # the cells are composed anew, which Hydra does for one application at a time
        try:
            show(str(config.hydra.runtime.choices.experiment), str(config.paths.runs), None, Console())
        finally:
            if sweep is not None:
                GlobalHydra.instance().initialize(sweep)
