"""Hydra answers a group that is chosen as null, or by anything but names of its files, with a traceback."""

from __future__ import annotations

from typing import Any

from hydra._internal import config_loader_impl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, create_defaults_list
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString

from hagd.errors import ConfigError

OPTIONAL = ("comparison", "experiment", "recipe", "variant", "hparams_search")
"""Groups of which no file is chosen by default; for them null means that."""


def settle_groups() -> None:
    """Let Hydra take null for no file of a group that needs none, and raise `ConfigError` for what names no file."""
    setattr(config_loader_impl, "create_defaults_list", _settled)  # noqa: B010 - types know functions as they were


def _settled(*, repo: IConfigRepository, overrides_list: list[Override], **options: Any) -> DefaultsList:
    """As Hydra's own.

    Raises:
        ConfigError: a group is chosen by something else than names.
    """
    for override in overrides_list:
        if repo.group_exists(override.key_or_group) and not override.is_delete():
            _settle(repo, override)
    return create_defaults_list(repo=repo, overrides_list=overrides_list, **options)


def _settle(repo: IConfigRepository, override: Override) -> None:
    group, value = override.key_or_group, override.value()
    if override.is_sweep_override() and not isinstance(value, ChoiceSweep):
        return
    for choice in value.list if isinstance(value, ChoiceSweep) else [value]:
        if not _is_choice(group, choice):
            raise ConfigError(
                f"{group}: expected one of {', '.join(repo.get_group_options(group))}, found "
                f"{str(override.input_line).partition('=')[2]}; choose one, or leave it out"
            )
    if value is None:
        override._value = []


def _is_choice(group: str, choice: Any) -> bool:
    if choice is None:
        return group in OPTIONAL
    names = choice if isinstance(choice, list) else [choice]
    return isinstance(choice, dict) or all(isinstance(name, str | QuotedString) for name in names)
