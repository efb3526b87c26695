"""`extract.py`: the whole chain for one configuration, its run folder and its W&B run."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from hagd.artifacts.store import disk_errors
from hagd.config.run import ExtractConfig
from hagd.errors import HagdError, MemoryLimitError
from hagd.pipeline.measurements import measurements
from hagd.pipeline.outputs import track, track_dictionaries, write_manifest, write_results, write_stopped
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.stage_runs import use
from hagd.pipeline.start import refuse_untrainable_dictionaries, start, tracked_pipeline
from hagd.report.assemble import flat_settings
from hagd.report.records import ReportData
from hagd.report.shown import in_slot_order, with_pruning
from hagd.report.terminal import print_summary
from hagd.search.pruning import not_pruned
from hagd.tasks.slot_order import left_to_right
from hagd.tracking.sweep_job import SweepJob
from hagd.transcoders.loaded import shown_config
from hagd.transcoders.metrics import flat_metrics
from hagd.transcoders.records import TranscoderSet

log = logging.getLogger(__name__)


def run_extraction(
    config: ExtractConfig, folder: Path, of_sweep: SweepJob | None, console: Console
) -> dict[str, float]:
    """Extract one circuit into `folder`; returns the flat metrics.

    A process that only lends its device to the trainings of another (`is_helper`) exits after them.

    Raises:
        HagdError: anything that the user can act on; of a measurement beside the report, after the other results are
            written.
    """
    began = time.perf_counter()
    start(config, folder)
    name = f"{config.model.name}-{config.task.name}-{config.seed}"
    with tracked_pipeline(config, console, name, of_sweep, "extract", folder) as (run, pipeline):
        for each in measurements(config):
            pipeline.key(each)  # settings that do not fit the other model are refused before hours of search
        if config.comparison is not None:
            refuse_untrainable_dictionaries(pipeline.compared)
        problems: dict[str, str] = {}
        if config.comparison is not None and pipeline.waits("search"):
            with _kept("comparison", config, problems):
                # Needed later; meanwhile another process makes what this job reads first.
                pipeline.compared.get("search")
        try:
            stored_report: ReportData = pipeline.get("report")
        except MemoryLimitError as error:
            with disk_errors(folder):
                write_stopped(pipeline, error, folder)
            raise
        measured = {**stored_report.metrics, **_measured(pipeline, config, problems)}
        for part in ("task", *pipeline.parents("report")):
            pipeline.get(part)
        stored = pipeline.used.values()
        dictionaries: TranscoderSet = pipeline.get("transcoders")
        run.configure(shown_config(config, dictionaries))
        warnings = (*stored_report.warnings, *problems.values())
        data = _shown(pipeline, replace(stored_report, metrics=measured, warnings=warnings))
        metrics = {
            **data.metrics,
            **flat_metrics(dictionaries, stored_report.slot_names),
            **_on_selection(data),
            "time.total_s": sum(each.seconds for each in stored),
            "time.wall_s": time.perf_counter() - began,
            "memory.peak_mb": max(each.peak_mb for each in stored),
        }
        with disk_errors(folder):
            write_manifest(pipeline, folder, complete=not problems)
            figures = write_results(data, metrics, folder)
        track(run, data, metrics, figures, folder)
        track_dictionaries(run, dictionaries, stored_report.slot_names)
        for name, used in pipeline.used.items():
            use(run, name, used)
        if problems:
            raise HagdError(f"{'; '.join(problems.values())}; the other results are in {folder}")
    print_summary(data, console)
    console.print(Text(f"\nresults: {folder}"), soft_wrap=True)
    return metrics


def _measured(pipeline: Pipeline, config: ExtractConfig, problems: dict[str, str]) -> dict[str, float]:
    """Figures of the measurements beside the report; `problems` gets those that fail and holds those that have."""
    found: dict[str, float] = {}
    for each in measurements(config):
        if each in problems:
            continue
        with _kept(each, config, problems):
            if each == "comparison" and not pipeline.store.contains(each, pipeline.key(each)):
                pipeline.compared.get("search")  # its seconds are not the comparison's
            found |= pipeline.get(each).metrics
    return found


@contextmanager
def _kept(measurement: str, config: ExtractConfig, problems: dict[str, str]) -> Iterator[None]:
    """What goes wrong with a measurement is noted in `problems`: the other results stay."""
    try:
        yield
    except HagdError as error:
        name = measurement
        if measurement == "comparison" and config.comparison is not None:
            name = f"comparison with {config.comparison.model.name} (comparison.model)"
        problems[measurement] = f"{name}: {error}"
        log.warning("%s", problems[measurement])


def _shown(pipeline: Pipeline, stored: ReportData) -> ReportData:
    """A stored report with what no stage stores.

    Its settings may come from a run that differed in what decides no result (paths, devices, tracking).
    """
    config, n_discovery = pipeline.config, len(pipeline.get("prompts").discovery)
    problem = not_pruned(pipeline.get("search"), config.search, pipeline.get("graph").n_candidates, n_discovery)
    if problem is not None:
        log.warning("%s", problem)
    data = replace(stored, settings=flat_settings(config, pipeline.get("transcoders")))
    return with_pruning(in_slot_order(data, left_to_right(pipeline.get("task"))), problem)


def _on_selection(data: ReportData) -> dict[str, float]:
    """Preservation of the reported circuit on the selection split, by which settings may be chosen."""
    measured = [part.preservation_after for part in data.search if part.preservation_after is not None]
    return {"selection.preservation": measured[-1]} if measured else {}
