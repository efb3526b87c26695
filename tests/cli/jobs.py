"""Jobs as the command line runs them: in this process, which imports once, or as a real command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import open_dict

from hagd.cli.extract import _extract
from hagd.cli.job import run_job
from hagd.cli.paths import conf_dir
from hagd.config.run import ExtractConfig
from tests.builders import tiny_settings

ROOT = Path(__file__).resolve().parents[2]


def tiny_overrides(runs: Path) -> list[str]:
    """`tiny_settings` for the command line."""
    settings = tiny_settings(runs)
    chosen = ["model=gpt2_mini", "task=sorting", "tracking=disabled"]
    del settings["model"]["kind"], settings["task"]["name"], settings["tracking"]
    return chosen + list(_flat(settings, ""))


def _flat(settings: dict[str, Any], prefix: str) -> Any:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}={value if isinstance(value, str) else json.dumps(value)}"


def run_here(folder: Path, *overrides: str, mode: str = "RUN") -> dict[str, float]:
    """What `python extract.py` does after Hydra has made the run folder `folder`; `MULTIRUN`: as a job of a sweep."""
    folder.mkdir(parents=True, exist_ok=True)
    runtime = [f"hydra.runtime.output_dir={folder}", f"hydra.mode={mode}", "hydra.job.num=0"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("extract", overrides=[*overrides, *runtime], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)
    with open_dict(composed):
        del composed["hydra"]
    return run_job(composed, ExtractConfig, _extract)


def command(*arguments: str, entry: str = "extract.py") -> list[str]:
    return [sys.executable, str(ROOT / entry), *arguments]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def run_command(cwd: Path, *arguments: str, entry: str = "extract.py") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments, entry=entry), cwd=cwd, env=environment(), capture_output=True, text=True, timeout=300
    )
