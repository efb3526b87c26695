"""`hagd-extract`: one circuit or the graph of one prompt, or one for every combination of a multirun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from hagd.cli.config_files import refuse_unreadable_files
from hagd.cli.groups import settle_groups
from hagd.cli.job import objective, run_job
from hagd.cli.paths import conf_dir
from hagd.cli.shared_store import share_config_store
from hagd.cli.sweep_end import sweep_ends
from hagd.cli.sweep_mode import report_wrong_sweeps
from hagd.cli.terminal import never_fail_to_print
from hagd.cli.unknown_key import problems_explained

if TYPE_CHECKING:
    from hagd.config.base import Section
    from hagd.tracking.sweep_job import SweepJob

OBJECTIVES = ("selection.preservation", "graph.replacement", "plan.peak_mb")
"""Preservation of a circuit on the selection split, the replacement score of a prompt, memory of a plan."""

settle_groups()  # here, because workers of launchers import this module and compose the configurations of their jobs


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="extract")
def _run(composed: DictConfig) -> float:
    """Returns what sweepers optimise: `optimized_metric`, or the first of `OBJECTIVES` that the job has."""
    from hagd.config.run import ExtractConfig

    return objective(run_job(composed, ExtractConfig, _extract), composed.optimized_metric, OBJECTIVES)


def main() -> None:
    """The command."""
    never_fail_to_print()
    share_config_store()
    refuse_unreadable_files()
    report_wrong_sweeps()
    with sweep_ends(), problems_explained(_schema):
        _run()


def _schema() -> type[Section]:
    from hagd.config.run import ExtractConfig

    return ExtractConfig


def _extract(config: object, folder: Path, of_sweep: SweepJob | None) -> dict[str, float]:
    from rich.console import Console

    from hagd.config.run import ExtractConfig

    assert isinstance(config, ExtractConfig)
    if config.mode == "plan":
        from hagd.pipeline.prompt_plan import run_plan

        return run_plan(config, folder, Console())
    if config.graph.scope == "prompt":
        from hagd.pipeline.prompt_extraction import run_prompt

        return run_prompt(config, folder, of_sweep, Console())
    from hagd.pipeline.extraction import run_extraction

    return run_extraction(config, folder, of_sweep, Console())


if __name__ == "__main__":
    main()
