"""`hagd-extract`: one circuit, or one for every combination of a multirun."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig

from hagd.cli.job import run_job
from hagd.cli.paths import conf_dir


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="extract")
def main(composed: DictConfig) -> float:
    """Returns the preservation on held-out prompts, which sweepers may maximise."""
    from hagd.config.run import ExtractConfig

    return run_job(composed, ExtractConfig, _extract)["validation.preservation"]


def _extract(config: object, folder: Path, group: str | None) -> dict[str, float]:
    from rich.console import Console

    from hagd.config.run import ExtractConfig
    from hagd.pipeline.extraction import run_extraction

    assert isinstance(config, ExtractConfig)
    return run_extraction(config, folder, group, Console())


if __name__ == "__main__":
    main()
