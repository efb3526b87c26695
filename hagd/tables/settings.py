"""Settings that a table is asked for with, beside those of its experiment."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from hagd.errors import ConfigError

_DECIDE_NOTHING = ("hydra", "paths", "tracking")
"""Sections on which no result depends."""


def settings_beside(name: str, overrides: Sequence[str], swept: Collection[str]) -> list[str]:
    """The overrides that hold for every cell, for example those of the command of a sweep.

    Args:
        name: of the table.
        overrides: as on the command line.
        swept: its keys that are swept; overrides of these choose cells, and are left out.

    Raises:
        ConfigError: an override cannot be read, or sweeps a key that makes no rows.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except HydraException:
        raise ConfigError(
            f"table {name}: expected settings such as search.n_nodes=40, found {' '.join(overrides)}"
        ) from None
    settings = []
    for override in parsed:
        if override.key_or_group in ("experiment", *swept):
            continue
        assert override.input_line is not None
        if override.is_sweep_override():
            raise ConfigError(
                f"table {name}: expected one value of {override.key_or_group}, which makes no rows, found "
                f"{override.input_line}; set one, or add the key to hydra.sweeper.params and axes of the experiment"
            )
        settings.append(override.input_line)
    return settings


def may_decide(setting: str) -> bool:
    """Whether results may depend on an override."""
    return re.split(r"[./=@]", setting.lstrip("+~"))[0] not in _DECIDE_NOTHING
