"""The configuration as the command line composes it."""

from __future__ import annotations

from copy import deepcopy
from functools import lru_cache
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from hagd.cli.paths import conf_dir

CONF = conf_dir()
GROUPS = ("model", "task", "transcoder", "graph", "hierarchy", "search", "validation", "report", "trainer", "tracking")


def options(group: str) -> list[str]:
    """Names of the files of a group."""
    return sorted(file.stem for file in (CONF / group).glob("*.yaml"))


def container(*overrides: str, entry: str = "extract") -> dict[str, Any]:
    """What `extract.py` or `train.py` gets for these overrides.

    Files are read once for each choice of options; Hydra sets values after that, here as on the command line.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    values = [each for each in parsed if not (CONF / each.key_or_group).is_dir()]
    chosen = tuple(str(each.input_line) for each in parsed if each not in values)
    composed = deepcopy(_composed(chosen, entry))
    ConfigLoaderImpl._apply_overrides_to_config(values, composed)
    resolved: Any = OmegaConf.to_container(composed, resolve=True)
    return dict(resolved)


@lru_cache(maxsize=128)
def _composed(options: tuple[str, ...], entry: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(entry, overrides=list(options))
