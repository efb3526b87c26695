"""Checked before Hydra makes its launcher and the first run folder, where it could only answer with a traceback."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class RunsFolder(Callback):
    """Ends the process with one line when `paths.runs` is no folder's name or cannot be written."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check(config)


class LauncherDevices(Callback):
    """Ends the process with one line when the launcher asks for `trainer.devices` processes and these are no number."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=False)
        if config.trainer.devices == "auto" and "${trainer.devices}" in launcher.values():
            print(
                f"error: trainer.devices: expected a number under hydra/launcher="
                f"{config.hydra.runtime.choices['hydra/launcher']}, found auto; set trainer.devices=N",
                file=sys.stderr,
            )
            sys.exit(1)


def _check(config: DictConfig) -> None:
    try:
        runs = OmegaConf.select(config, "paths.runs")
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        print(f"error: paths.runs: expected the name of a folder, found: {why}; correct it", file=sys.stderr)
        sys.exit(1)
    if not isinstance(runs, str) or not runs:
        print(f"error: paths.runs: expected the name of a folder, found {runs!r}; set paths.runs=runs", file=sys.stderr)
        sys.exit(1)
    folder = Path(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        print(
            f"error: paths.runs: expected a folder that can be written, found {folder} ({error.strerror}); make it "
            "writable, free space on its disk, or set paths.runs to another folder",
            file=sys.stderr,
        )
        sys.exit(1)
