"""`train.py`: one training stage with its run folder and its W&B run."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.text import Text

from hagd.artifacts.keys import stage_key
from hagd.artifacts.store import Stored, disk_errors
from hagd.config.load import load_config
from hagd.config.run import StagesConfig, TrainConfig
from hagd.errors import ConfigError
from hagd.models.records import TrainedLM
from hagd.pipeline.dictionaries import export
from hagd.pipeline.outputs import track_dictionaries, write_config, write_manifest, write_metrics
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.stage_runs import use
from hagd.pipeline.start import refuse_untrainable_dictionaries, tracked_pipeline
from hagd.search.scorer.records import ScoredGraph, TrainedScorer
from hagd.tracking.sweep_job import SweepJob
from hagd.tracking.wandb_run import Run
from hagd.training.processes import is_helper
from hagd.transcoders.formats.files import refuse_unwritable
from hagd.transcoders.loaded import shown_config
from hagd.transcoders.metrics import flat_metrics
from hagd.transcoders.records import TranscoderSet

log = logging.getLogger(__name__)

SectionReader = Callable[[str, str], dict[str, Any]]
_SCORER_VERSION = 2


def run_training(
    config: TrainConfig, sections: SectionReader, folder: Path, of_sweep: SweepJob | None, console: Console
) -> dict[str, float]:
    """Train `config.stage`, and first whatever it needs; returns flat metrics with the key `objective`.

    A process that only lends its device to the trainings of another (`is_helper`) exits after them.

    Args:
        config: the whole configuration.
        sections: reads a configuration file by group and name (`model`, `gpt2_mini`), for the models and tasks on
            which the scorer is meta-trained.
        folder: the run folder.
        of_sweep: the sweep that the job is of, if any.
        console: where progress goes.

    Raises:
        HagdError: anything that the user can act on.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    if config.stage == "transcoder":
        refuse_untrainable_dictionaries(Pipeline(config, Console(quiet=True)))
    train = {"lm": _train_lm, "transcoder": _train_transcoders, "gnn": _train_scorer}[config.stage]
    if is_helper():
        train(config, Pipeline(config, Console(quiet=True)), sections, Run(None))
        raise SystemExit(0)
    if config.export.path is not None:
        refuse_unwritable(Path(config.export.path).expanduser())
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder)
    name = f"{config.stage}-{config.model.name}-{config.task.name}-{config.seed}"
    with tracked_pipeline(config, console, name, of_sweep, config.stage, folder) as (run, pipeline):
        metrics = train(config, pipeline, sections, run)
        stored = pipeline.used.values()
        metrics["time.total_s"] = sum(each.seconds for each in stored)
        metrics["memory.peak_mb"] = max(each.peak_mb for each in stored)
        run.summary(metrics)
        with disk_errors(folder):
            write_manifest(pipeline, folder)
            write_metrics(metrics, folder)
    for key, value in metrics.items():
        if not key.startswith("transcoder.layer"):  # a large model has hundreds of them
            console.print(Text(f"{key}: {value:.4g}"))
    console.print(Text(f"\nresults: {folder}"), soft_wrap=True)
    return metrics


def _train_lm(config: TrainConfig, pipeline: Pipeline, _: SectionReader, run: Run) -> dict[str, float]:
    if config.model.kind != "mini":
        raise ConfigError(
            f"stage=lm: expected a mini model, found model.kind={config.model.kind}; pretrained models need no training"
        )
    trained: TrainedLM = pipeline.get("lm")
    use(run, "lm", pipeline.used["lm"])
    return {"objective": trained.accuracy, "model.accuracy": trained.accuracy}


def _train_transcoders(config: TrainConfig, pipeline: Pipeline, _: SectionReader, run: Run) -> dict[str, float]:
    found: TranscoderSet = pipeline.get("transcoders")
    run.configure(shown_config(config, found))
    slot_names = pipeline.get("prompts").slot_names
    track_dictionaries(run, found, slot_names)
    use(run, "transcoders", pipeline.used["transcoders"])
    if config.export.path is not None and not is_helper():
        with disk_errors(Path(config.export.path)):
            export(found, config.export, config.model, pipeline.lm)
        pipeline.console.print(Text(f"dictionaries copied: {config.export.path}"), soft_wrap=True)
    metrics = flat_metrics(found, slot_names)
    return {"objective": -metrics.get("transcoder.fvu", math.nan), **metrics}


def _train_scorer(config: TrainConfig, pipeline: Pipeline, sections: SectionReader, run: Run) -> dict[str, float]:
    from hagd.search.scorer.training import train_scorer

    sources = [
        pipeline.beside(_source(config, sections("model", model), sections("task", task), seed))
        for seed in config.gnn.seeds
        for model in config.gnn.models
        for task in config.gnn.tasks
    ]
    parents = {str(i): source.key("search") for i, source in enumerate(sources)}
    settings = config.gnn.model_dump(mode="json", include={"edges", "hidden", "heads", "n_layers", "epochs"})
    settings |= {"learning_rate": config.gnn.learning_rate, "weight_decay": config.gnn.weight_decay}
    precision = config.trainer.precision
    settings |= {} if precision == "32-true" else {"precision": precision}
    key = stage_key("scorer", _SCORER_VERSION, settings, parents, config.seed)
    stored_before = pipeline.store.contains("scorer", key)
    for source in () if stored_before else sources:
        refuse_untrainable_dictionaries(source)
    graphs = [] if stored_before else [_labelled(source) for source in sources]
    loggers = [] if pipeline.stage_runs is None else pipeline.stage_runs.loggers("scorer", run)
    stored: Stored[TrainedScorer] = pipeline.store.get_or_compute(
        "scorer",
        key,
        TrainedScorer,
        lambda work: train_scorer(
            graphs or [_labelled(source) for source in sources],  # none yet where a damaged scorer is made again
            config.gnn,
            config.seed,
            config.trainer,
            work / "checkpoints",
            loggers,
        ),
        {"config": settings, "parents": parents, "seed": config.seed},
        joint=True,
    )
    pipeline.used["scorer"] = stored
    run.artifact(f"scorer-{run.id}", "scorer", stored.path)
    found = stored.record
    metrics = {"graphs": float(len(sources)), "objective": 0.0}
    if found.validation_correlation is not None and found.importance_correlation is not None:
        metrics |= {
            "objective": found.validation_correlation,
            "scorer.correlation": found.validation_correlation,
            "scorer.importance_correlation": found.importance_correlation,
        }
    return metrics


def _source(config: TrainConfig, model: dict[str, Any], task: dict[str, Any], seed: int) -> StagesConfig:
    """The extraction whose circuit labels one graph: searched without scorer, so labels owe nothing to one."""
    plain = config.model_dump(mode="json", exclude={"stage", "gnn", "export"})
    search = {**plain["search"], "scorer": None}
    return load_config(StagesConfig, {**plain, "model": model, "task": task, "seed": seed, "search": search})


def _labelled(source: Pipeline) -> ScoredGraph:
    from hagd.search.scorer.inputs import membership_target, scored_graph

    config = source.config
    result, graph, hierarchy = source.get("search"), source.get("graph"), source.get("hierarchy")
    name = f"{config.model.name}-{config.task.name}-{config.seed}"
    return scored_graph(graph, hierarchy, membership_target(result.circuits, graph.flat), name, source.lm.n_layers)
