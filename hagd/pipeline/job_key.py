"""One address for one job: what a rerun skips and a table looks up."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from hagd.artifacts.keys import stage_key
from hagd.config.run import ExtractConfig, StagesConfig, TrainConfig
from hagd.pipeline.measurements import measurements
from hagd.pipeline.pipeline import Pipeline


def job_key(config: StagesConfig) -> str:
    """Address of what `extract.py` or `train.py` makes of `config`; `manifest.json` of the run folder has it.

    The content address of the job's last stage and of its further measurements, and so of everything that decides a
    result: the configuration less what decides time and space alone (paths, tracking, devices where their number
    decides no more than rounding, batch sizes of evaluations), the seed, versions of the code of stages, the files of a
    pretrained model, of a corpus, of a task and of a scorer. Nothing is computed or loaded.

    Args:
        config: the validated configuration.

    Returns:
        16 hexadecimal digits. With `stage=gnn` the models and tasks of `gnn` count by their names, not by what their
        files hold.

    Raises:
        HagdError: files that the configuration names are missing.
    """
    stage, own = _last_stage(config)
    pipeline = Pipeline(config, Console(quiet=True))
    made = (stage, *(measurements(config) if isinstance(config, ExtractConfig) else ()))
    return stage_key(f"job {stage}", 1, own, {name: pipeline.key(name) for name in made}, config.seed)


def _last_stage(config: StagesConfig) -> tuple[str, dict[str, Any]]:
    """The stage whose result the job makes, and settings of the job that no stage has."""
    if isinstance(config, TrainConfig):
        stage = {"lm": "lm", "transcoder": "transcoders", "gnn": "search"}[config.stage]
        own = {"stage", "export"} | ({"gnn"} if config.stage == "gnn" else set())
        return stage, config.model_dump(mode="json", include=own)
    assert isinstance(config, ExtractConfig)
    stage = "report" if config.graph.scope == "task" else "prompt_report"
    return stage, config.model_dump(mode="json", include={"mode"})
