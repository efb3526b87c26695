"""`hagd-train`: one training stage (mini model, transcoders, or the meta-learned scorer)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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

settle_groups()  # here, because workers of launchers import this module and compose the configurations of their jobs


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def _run(composed: DictConfig) -> float:
    """Returns `optimized_metric`, or the stage's figure of merit: held-out accuracy, minus FVU, or rank correlation."""
    from hagd.config.run import TrainConfig

    return objective(run_job(composed, TrainConfig, _train), composed.optimized_metric, ("objective",))


def main() -> None:
    """The command."""
    never_fail_to_print()
    share_config_store()
    refuse_unreadable_files()
    report_wrong_sweeps()
    with sweep_ends(), problems_explained(_schema):
        _run()


def _schema() -> type[Section]:
    from hagd.config.run import TrainConfig

    return TrainConfig


def _train(config: object, folder: Path, of_sweep: SweepJob | None) -> dict[str, float]:
    from rich.console import Console

    from hagd.config.run import TrainConfig
    from hagd.pipeline.training import run_training

    assert isinstance(config, TrainConfig)
    return run_training(config, _section, folder, of_sweep, Console())


def _section(group: str, name: str) -> dict[str, Any]:
    """One file of the configuration.

    Raises:
        ConfigError: there is no such file (lists those that exist), or it cannot be read or has no keys.
    """
    from hagd.config.yaml_files import no_keys, yaml_content
    from hagd.errors import ConfigError

    file = conf_dir() / group / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(each.stem for each in file.parent.glob("*.yaml")))
        raise ConfigError(f"gnn.{group}s: expected names of conf/{group}, found {name}; there are: {known}")
    section = yaml_content(file)
    if not isinstance(section, dict):
        raise ConfigError(no_keys(file, section))
    return section


if __name__ == "__main__":
    main()
