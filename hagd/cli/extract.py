"""`hagd-extract`: one circuit, or one for every combination of a multirun."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import hydra
from omegaconf import DictConfig

from hagd.cli.job import run_job
from hagd.cli.paths import conf_dir
from hagd.cli.unknown_key import nearest_key_named

if TYPE_CHECKING:
    from hagd.config.base import Section


@hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="extract")
def _run(composed: DictConfig) -> float:
    """Returns the preservation on held-out prompts, which sweepers may maximise."""
    from hagd.config.run import ExtractConfig

    return run_job(composed, ExtractConfig, _extract)["validation.preservation"]


def main() -> None:
    """The command."""
    with nearest_key_named(_schema):
        _run()


def _schema() -> type[Section]:
    from hagd.config.run import ExtractConfig

    return ExtractConfig


def _extract(config: object, folder: Path, group: str | None) -> dict[str, float]:
    from rich.console import Console

    from hagd.config.run import ExtractConfig
    from hagd.pipeline.extraction import run_extraction

    assert isinstance(config, ExtractConfig)
    return run_extraction(config, folder, group, Console())


if __name__ == "__main__":
    main()
