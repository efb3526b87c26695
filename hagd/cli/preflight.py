"""Checked before Hydra makes its launcher and the first run folder, where it could only answer with a traceback."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any, NoReturn

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class RunsFolder(Callback):
    """Ends the process with one line when `paths.runs` or the job's folder is none that can be written."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check(config, "paths.runs", "runs")
        _check(config, "hydra.run.dir", "FOLDER")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check(config, "paths.runs", "runs")
        _check(config, "hydra.sweep.dir", "FOLDER")


class LauncherDevices(Callback):
    """Ends the process with one line when the launcher asks for `trainer.devices` processes and these are no number."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        launcher: Any = OmegaConf.to_container(config.hydra.launcher, resolve=False)
        if config.trainer.devices == "auto" and "${trainer.devices}" in launcher.values():
            _refuse(
                f"trainer.devices: expected a number under hydra/launcher="
                f"{config.hydra.runtime.choices['hydra/launcher']}, found auto; set trainer.devices=N"
            )


def _check(config: DictConfig, key: str, example: str) -> None:
    try:
        given = OmegaConf.select(config, key)
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        _refuse(f"{key}: expected the name of a folder, found: {why}; correct it")
    if not isinstance(given, str) or not given:
        _refuse(f"{key}: expected the name of a folder, found {given!r}; set {key}={example}")
    folder = Path(given)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
    except OSError as error:
        _refuse(
            f"{key}: expected a folder that can be written, found {folder} ({error.strerror}); make it writable, free "
            f"space on its disk, or set {key} to another folder"
        )


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
