"""What every kind of `extract.py` run does before its stages."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from hagd.artifacts.store import disk_errors
from hagd.config.run import ExtractConfig
from hagd.pipeline.outputs import write_config
from hagd.pipeline.pipeline import Pipeline
from hagd.training.processes import is_helper


def start(config: ExtractConfig, folder: Path) -> None:
    """Threads, the run folder and its `config.yaml`.

    A process that only lends its device to the trainings of another (`is_helper`) exits here, after them.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    if is_helper():
        Pipeline(config, Console(quiet=True)).get("transcoders")
        raise SystemExit(0)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder)
