"""Hydra answers a configuration file that it cannot read with a traceback; this lets the command say what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from hydra._internal import utils
from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import ListConfig

from hagd.config.yaml_files import UNREADABLE, no_keys, unreadable
from hagd.errors import ConfigError

T = TypeVar("T")

_load_config = ConfigRepository.load_config
_run_and_report = utils.run_and_report


def refuse_unreadable_files() -> None:
    """Let Hydra raise `ConfigError` for files that it cannot read, and leave it to the command to print it."""
    setattr(ConfigRepository, "load_config", _load)  # noqa: B010 - types know methods as they were
    setattr(utils, "run_and_report", _run)  # noqa: B010


def _load(repository: ConfigRepository, config_path: str) -> ConfigResult | None:
    """As Hydra's own.

    Raises:
        ConfigError: the file cannot be read, or is a list.
    """
    try:
        result = _load_config(repository, config_path)
    except HydraException:
        raise
    except UNREADABLE as error:
        file = _file(repository, config_path)
        if file is None:
            raise
        raise ConfigError(unreadable(file, error)) from None
    if result is not None and isinstance(result.config, ListConfig):
        raise ConfigError(no_keys(_file(repository, config_path) or Path(config_path), result.config))
    return result


def _file(repository: ConfigRepository, config_path: str) -> Path | None:
    """Where Hydra reads a configuration; None if that is no file."""
    source = repository._find_object_source(config_path, ObjectType.CONFIG)
    if source is None or source.scheme() != "file":
        return None
    return Path(source.path) / source._normalize_file_name(config_path)


def _run(function: Callable[[], T]) -> T:
    """As Hydra's own, which prints a traceback of exceptions that are not its own, but passes a `ConfigError` on."""
    refused: list[ConfigError] = []

    def held() -> T | None:
        try:
            return function()
        except ConfigError as error:
            refused.append(error)
            return None

    result: T = _run_and_report(held)
    if refused:
        raise refused[0]
    return result
