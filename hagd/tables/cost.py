"""What missing jobs would cost, from what finished ones took."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from rich.console import Console

from hagd.artifacts.store import ArtifactStore
from hagd.pipeline.measurements import measurements
from hagd.pipeline.pipeline import Pipeline
from hagd.tables.runs import FinishedRun
from hagd.tables.view import CellRuns

LAST = {"task": "report", "prompt": "prompt_report"}
"""`graph.scope` → the stage that a job ends with."""


@dataclass(frozen=True)
class Estimate:
    """Cost of one missing job.

    Attributes:
        stages: address of every result that is not stored yet → seconds; None = unknown.
    """

    stages: dict[str, float | None]

    @property
    def seconds(self) -> float | None:
        """Of the job alone; None when one of its stages has never been timed."""
        return total([self])


def total(estimates: Sequence[Estimate]) -> float | None:
    """Seconds of several jobs on one core; results that they share count once. None when one is unknown."""
    shared = {key: seconds for estimate in estimates for key, seconds in estimate.stages.items()}
    if any(seconds is None for seconds in shared.values()):
        return None
    return sum(seconds for seconds in shared.values() if seconds is not None)


def estimate(
    missing: CellRuns, seed: int, cells: Sequence[CellRuns], others: Collection[FinishedRun], runs: Path
) -> Estimate:
    """Stages that the job would compute, each with the mean time that it took in the cells most like this one.

    Likeness is the number of axes with the same value. Stages that no cell has timed are taken from all `others`, those
    whose result is stored cost nothing.
    """
    config = missing.cell.configs[seed]
    pipeline = Pipeline(config, Console(quiet=True))
    store = ArtifactStore(runs / "artifacts")
    wanted = [(pipeline, last) for last in (LAST[config.graph.scope], *measurements(config))]
    if config.comparison is not None:
        wanted.append((pipeline.compared, "search"))
    keys = {each.key(name): name for each, last in wanted for name in _stages(each, last)}
    return Estimate(
        {key: _seconds(name, missing, cells, others) for key, name in keys.items() if not store.contains(name, key)}
    )


def _stages(pipeline: Pipeline, last: str) -> set[str]:
    """`last` and all that it is made from."""
    parents = pipeline.parents(last)
    return {last}.union(*(_stages(pipeline, parent) for parent in parents)) if parents else {last}


def _seconds(stage: str, missing: CellRuns, cells: Sequence[CellRuns], others: Collection[FinishedRun]) -> float | None:
    timed = [(_likeness(missing, cell), run) for cell in cells for run in cell.done.values()]
    timed += [(-1, run) for run in others]
    timed = [(likeness, run) for likeness, run in timed if stage in run.stages]
    if not timed:
        return None
    best = max(likeness for likeness, _ in timed)
    return fmean(run.stages[stage].seconds for likeness, run in timed if likeness == best)


def _likeness(one: CellRuns, other: CellRuns) -> int:
    return sum(other.cell.values.get(axis) == value for axis, value in one.cell.values.items())


def spent(runs: Sequence[FinishedRun]) -> float:
    """Seconds of computing that `runs` rest on; results that they share count once."""
    return sum({stage.key: stage.seconds for run in runs for stage in run.stages.values()}.values())
