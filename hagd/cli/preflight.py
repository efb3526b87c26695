"""Checked before Hydra makes the first run folder, where it could only answer with its own traceback."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class RunsFolder(Callback):
    """Ends the process with one line when `paths.runs` cannot be written."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check(Path(str(config.paths.runs)))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check(Path(str(config.paths.runs)))


def _check(folder: Path) -> None:
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
