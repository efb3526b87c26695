"""A W&B run for every stage that a job computes, with its result as an artifact and the results that it read as inputs.

Curves of trainings go there and, W&B or not, to `training/<stage>/metrics.csv` in the run folder.
Artifacts are named after content addresses, so a result that many jobs share is one artifact, whoever made it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hagd.artifacts.store import Stored
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import AttributionGraph
from hagd.config.run import StagesConfig
from hagd.errors import ConfigError
from hagd.hierarchy.records import Hierarchy
from hagd.models.records import TrainedLM
from hagd.search.records import SearchResult
from hagd.tracking.wandb_run import Run, tracked_run
from hagd.transcoders.loaded import shown_config
from hagd.transcoders.metrics import SCALARS
from hagd.transcoders.records import TranscoderSet
from hagd.validation.records import Comparison, DarkMatter, Validation

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

ARTIFACTS = {
    "lm": "model",
    "transcoders": "transcoders",
    "graph": "graph",
    "hierarchy": "hierarchy",
    "search": "circuit",
    "validation": "validation",
    "dark_matter": "dark_matter",
    "comparison": "comparison",
    "prompt_graph": "prompt_graph",
}
"""Stage → type of its artifact; the other stages are quickly made again and have no run."""


@dataclass(frozen=True)
class StageRuns:
    """Opens runs of stages in the group of a job.

    Attributes:
        config: of the job.
        group: name of the sweep, or of the single run.
        folder: of the run.
    """

    config: StagesConfig
    group: str
    folder: Path

    @contextmanager
    def open(self, stage: str, key: str) -> Iterator[Run | None]:
        """A run for the time in which `stage` is computed and stored; None for small stages, and without tracking."""
        config = self.config
        if stage not in ARTIFACTS or config.tracking.mode == "disabled":
            yield None
            return
        with tracked_run(
            config.tracking,
            name=f"{stage}-{config.model.name}-{config.task.name}-{config.seed}",
            group=self.group,
            job_type=stage,
            config={**shown_config(config, None), "stage_key": key},
            directory=Path(config.paths.runs),
            packages=False,  # the job's run has them
        ) as run:
            yield run

    def loggers(self, stage: str, run: Run | None) -> list[Logger]:
        """Where the training of `stage` logs its curves.

        Raises:
            ConfigError: TensorBoard is asked for and not installed.
        """
        from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger

        taken = sum(1 for _ in self.folder.glob(f"training/{stage}*"))  # by attempts that a cluster requeued
        place: dict[str, Any] = {
            "save_dir": self.folder,
            "name": "training",
            "version": f"{stage}-{taken}" if taken else stage,
        }
        loggers: list[Logger] = [CSVLogger(**place)]
        if self.config.tracking.tensorboard:
            try:
                loggers.append(TensorBoardLogger(**place))
            except ModuleNotFoundError as error:
                raise ConfigError(
                    "tracking.tensorboard: expected the package tensorboard, found none; pip install "
                    '"hagd[tensorboard]", or set it to false'
                ) from error
        return loggers + ([] if run is None else run.lightning_loggers())


def log_stage(run: Run, stage: str, stored: Stored[Any], parents: Sequence[tuple[str, Stored[Any]]]) -> None:
    """Figures of a stage's result, the result itself as an artifact, and what it was made from."""
    for name, parent in parents:
        use(run, name, parent)
    if type(stored.record) in _STEPS:
        for step, values in _STEPS[type(stored.record)](stored.record):
            run.log(values, step=step)
    figures = _FIGURES[type(stored.record)](stored.record)
    run.summary({**figures, f"{stage}.seconds": stored.seconds, f"{stage}.peak_mb": stored.peak_mb})
    run.artifact(artifact_name(stage, stored.key), ARTIFACTS[stage], stored.path, {"stage": stage, "key": stored.key})


def use(run: Run, stage: str, stored: Stored[Any]) -> None:
    """Note that `run` read the result of `stage`, if that is an artifact."""
    if stage in ARTIFACTS:
        run.use(artifact_name(stage, stored.key), ARTIFACTS[stage], stored.path, {"stage": stage, "key": stored.key})


def artifact_name(stage: str, key: str) -> str:
    """`transcoders-1b2c…`; the circuit is the result of the stage `search`."""
    return f"{ARTIFACTS[stage]}-{key}"


def _of_search(result: SearchResult) -> dict[str, float]:
    return {"circuit.nodes": result.size, "search.evaluations": result.evaluations}


def _search_steps(result: SearchResult) -> Iterator[tuple[int, dict[str, float]]]:
    spent = 0.0
    for number, step in enumerate(result.steps):
        spent += step.evaluations
        yield number, {"search/preservation": step.preservation, "search/evaluations": spent}


def _hierarchy_levels(hierarchy: Hierarchy) -> Iterator[tuple[int, dict[str, float]]]:
    for depth, level in enumerate(hierarchy.levels, start=1):
        yield depth, {"hierarchy/supernodes": level.n_supernodes, "hierarchy/modularity": level.modularity}


def _of_transcoders(found: TranscoderSet) -> dict[str, float]:
    return {f"layer{q.layer}.{name}": getattr(q, name) for q in found.quality for name in SCALARS}


_FIGURES: dict[type[Any], Callable[[Any], dict[str, float]]] = {
    TrainedLM: lambda trained: {"model.accuracy": trained.accuracy},
    TranscoderSet: _of_transcoders,
    AttributionGraph: lambda graph: {"graph.nodes": len(graph.nodes.kind), "graph.edges": len(graph.edge_attr)},
    Hierarchy: lambda hierarchy: {"hierarchy.levels": len(hierarchy.levels)},
    SearchResult: _of_search,
    Validation: lambda validation: validation.metrics,
    DarkMatter: lambda found: found.metrics,
    Comparison: lambda found: found.metrics,
    PromptGraph: lambda graph: {"graph.edges": len(graph.edge_attr), "graph.replacement": graph.replacement},
}
_STEPS: dict[type[Any], Callable[[Any], Iterator[tuple[int, dict[str, float]]]]] = {
    SearchResult: _search_steps,
    Hierarchy: _hierarchy_levels,
}
