"""`hagd-train`: one training stage (mini model, transcoders, or the meta-learned scorer)."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from hagd.cli.job import run_job
from hagd.cli.paths import conf_dir


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="train")
def main(composed: DictConfig) -> float:
    """Returns the stage's figure of merit: held-out accuracy, minus FVU, or rank correlation."""
    from hagd.config.run import TrainConfig

    return run_job(composed, TrainConfig, _train)["objective"]


def _train(config: object, folder: Path, group: str | None) -> dict[str, float]:
    from rich.console import Console

    from hagd.config.run import TrainConfig
    from hagd.pipeline.training import run_training

    assert isinstance(config, TrainConfig)
    return run_training(config, folder, group, Console())


if __name__ == "__main__":
    main()
