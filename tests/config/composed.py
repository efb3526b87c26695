"""The configuration as the command line composes it."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from hagd.cli.paths import conf_dir

CONF = conf_dir()
GROUPS = ("model", "task", "transcoder", "graph", "hierarchy", "search", "validation", "report", "trainer", "tracking")


def options(group: str) -> list[str]:
    """Names of the files of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def container(*overrides: str, entry: str = "extract") -> dict[str, Any]:
    """What `extract.py` or `train.py` gets for these overrides."""
    return deepcopy(_container(overrides, entry))


@lru_cache(maxsize=64)
def _container(overrides: tuple[str, ...], entry: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed: Any = OmegaConf.to_container(compose(entry, overrides=list(overrides)), resolve=True)
    return dict(composed)
