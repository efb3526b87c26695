"""Hydra takes a sweep whose configuration is wrong for a single run, and complains of its lists of values instead."""

from __future__ import annotations

from hydra._internal import utils
from hydra._internal.hydra import Hydra
from hydra.types import RunMode


def report_wrong_sweeps() -> None:
    """Let Hydra report what is wrong with a configuration where it finds out whether it is that of a sweep."""
    setattr(Hydra, "get_mode", _mode)  # noqa: B010 - types know methods as they were


def _mode(hydra: Hydra, config_name: str | None, overrides: list[str]) -> RunMode | None:
    """As Hydra's own, which returns None for any error."""
    mode: RunMode | None = utils.run_and_report(
        lambda: (
            hydra.compose_config(
                config_name=config_name,
                overrides=overrides,
                with_log_configuration=False,
                run_mode=RunMode.MULTIRUN,
                validate_sweep_overrides=False,
            ).hydra.mode
        )
    )
    return mode
