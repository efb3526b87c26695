"""What runs do before their stages."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console

from hagd.artifacts.store import disk_errors
from hagd.config.run import ExtractConfig, StagesConfig
from hagd.errors import ConfigError
from hagd.pipeline.job_key import job_key
from hagd.pipeline.outputs import write_config
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.stage_runs import StageRuns
from hagd.tracking.sweep_job import SweepJob
from hagd.tracking.wandb_run import Run, tracked_run
from hagd.training.processes import is_helper
from hagd.transcoders.loaded import shown_config
from hagd.transcoders.optimisers import refuse_missing_package


def start(config: ExtractConfig, folder: Path) -> None:
    """Threads of `extract.py`, the run folder and its `config.yaml`.

    A process that only lends its device to the trainings of another (`is_helper`) exits here, after them.

    Raises:
        HagdError: files that the configuration names are missing, or a package that it needs.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    refuse_untrainable_dictionaries(Pipeline(config, Console(quiet=True)))
    if is_helper():
        Pipeline(config, Console(quiet=True)).get("transcoders")
        raise SystemExit(0)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder)
    job_key(config)  # whatever the configuration names is there


def refuse_untrainable_dictionaries(pipeline: Pipeline) -> None:
    """Before any stage runs.

    Raises:
        ConfigError: dictionaries are to be trained and the package of their optimiser is not installed.
    """
    options = pipeline.config.transcoder
    if options.path is not None:
        return
    try:
        refuse_missing_package(options)
    except ConfigError:
        if not pipeline.store.contains("transcoders", pipeline.key("transcoders")):
            raise


@contextmanager
def tracked_pipeline(
    config: StagesConfig,
    console: Console,
    name: str,
    of_sweep: SweepJob | None,
    job_type: str,
    folder: Path,
) -> Iterator[tuple[Run, Pipeline]]:
    """A W&B run with the resolved configuration, and a pipeline whose stages have runs of their own in its group.

    `tracking.json` in the run folder says where the W&B run is.
    """
    group = of_sweep.sweep if of_sweep else f"{folder.parent.name}_{folder.name}"  # date and time
    with tracked_run(
        config.tracking,
        name=of_sweep.name(name) if of_sweep else name,
        group=group,
        job_type=job_type,
        config=shown_config(config, None),
        directory=Path(config.paths.runs),
    ) as run:
        _link(run, folder)
        yield run, Pipeline(config, console, StageRuns(config, group, folder))


def _link(run: Run, folder: Path) -> None:
    """`tracking.json`: id of the W&B run, its page or, offline, its folder relative to the run folder."""
    if run.dir is None:
        return
    where = {"url": run.url} if run.url else {"folder": os.path.relpath(run.dir, folder.absolute())}
    with disk_errors(folder):
        (folder / "tracking.json").write_text(json.dumps({"id": run.id, **where}))
