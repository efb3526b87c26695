"""What a table is: an experiment that sweeps, and the description of its rows, columns and published figures.

An experiment file is a table when it has a callback `table` (`WriteTable`). `hydra.sweeper.params` says which jobs
there are; the callback's other keys say how they are shown. So `extract.py experiment=NAME` and `hagd-tables` read the
same file, and nothing is said twice.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from pydantic import Field, model_validator

from hagd.cli.paths import conf_dir
from hagd.cli.unknown_key import key_advice, option_advice
from hagd.config.base import Section
from hagd.config.load import load_config, plain
from hagd.config.run import ExtractConfig
from hagd.config.yaml_files import yaml_content
from hagd.errors import ConfigError
from hagd.tables.settings import may_decide, settings_beside

SEED = "seed"
"""The swept key that makes no rows: its values are the repetitions of a cell."""


class Axis(Section):
    """One swept key; its values make rows."""

    label: str = Field(description="head of the column")
    values: dict[str, str] = Field({}, description="value → what is shown for it; others are shown as they are")


class Parts(Section):
    """Rows within a cell: what is written `{part}` in the metrics of columns."""

    label: str = Field(description="head of the column")
    values: dict[str, str] = Field(min_length=1, description="part → what is shown for it")


class Column(Section):
    """One figure of every row."""

    metric: str = Field(
        description="key in metrics.json, or stage.NAME.seconds, stage.NAME.peak_mb of manifest.json; {part} stands "
        "for the part of the cell that the row shows"
    )
    label: str = Field(description="head of the column")
    digits: int = Field(2, ge=0, description="decimals")
    controls: dict[str, str] = Field({}, description="mark → metric that the figure is compared with, of the same runs")


class Fit(Section):
    """A power law through all finished runs of the table: figure ∝ x to some exponent."""

    column: str = Field(description="the figure")
    x: str = Field(description="metric that it grows with")
    label: str = Field(description="what x is")


class Published(Section):
    """Figures that a publication reports: shown in columns of their own, never computed with."""

    row: dict[str, str] | None = Field(None, description="the row beside which they stand; null = a row of their own")
    figures: dict[str, str] = Field(description="column → figure, as text")
    of: str = Field(description="what they were measured on")
    source: str = Field(description="where they are reported")


class NotRun(Section):
    """A row that cannot be run here. It stays empty whatever runs there are."""

    row: dict[str, str] = Field(description="key → value")
    needs: str = Field(description="what it would need")


class TableSpec(Section):
    """How the jobs of an experiment are shown."""

    title: str = Field(description="one line")
    note: str = Field("", description="what a reader must know")
    axes: dict[str, Axis] = Field(min_length=1, description="swept key → rows, in the order of their columns")
    parts: Parts | None = Field(None, description="rows within a cell (null = a cell is one row)")
    columns: dict[str, Column] = Field(min_length=1, description="name → figure")
    controls: dict[str, str] = Field({}, description="mark → what the control is")
    fits: tuple[Fit, ...] = Field((), description="exponents below the table")
    published: tuple[Published, ...] = Field((), description="figures of publications")
    not_run: tuple[NotRun, ...] = Field((), description="rows that cannot be run here")

    @model_validator(mode="after")
    def _names_are_known(self) -> TableSpec:
        problems = [
            f"columns.{name}.controls: expected marks of controls ({', '.join(self.controls) or 'none'}), found {mark}"
            for name, column in self.columns.items()
            for mark in column.controls
            if mark not in self.controls
        ]
        problems += [
            f"published and fits: expected a column ({', '.join(self.columns)}), found {name}"
            for name in [*(n for each in self.published for n in each.figures), *(fit.column for fit in self.fits)]
            if name not in self.columns
        ]
        problems += [
            f"row: expected the axes ({', '.join(self.axes)}), found {key}"
            for row in [*(each.row or {} for each in self.published), *(each.row for each in self.not_run)]
            for key in row
            if key not in self.axes
        ]
        if problems:
            raise ValueError("; ".join(problems))
        return self


@dataclass(frozen=True)
class Cell:
    """The jobs of one row, which differ in their seed alone.

    Attributes:
        values: axis → value.
        configs: seed → configuration.
    """

    values: dict[str, str]
    configs: dict[int, ExtractConfig]


@dataclass(frozen=True)
class Table:
    """A table with all its jobs.

    Attributes:
        name: of its experiment.
        spec: how it is shown.
        cells: in the order of the sweep.
        changed: settings other than the experiment's, when results differ by them.
    """

    name: str
    spec: TableSpec
    cells: tuple[Cell, ...]
    changed: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """Name of its files; of other settings than the experiment's, it ends in their address."""
        name = self.name.replace("/", "_")
        if not self.changed:
            return name
        return f"{name}-{hashlib.sha256(' '.join(sorted(self.changed)).encode()).hexdigest()[:8]}"


def table_names(conf: Path | None = None) -> list[str]:
    """Experiments below `conf` that are tables, `quick/` ones last."""
    root = (conf or conf_dir()) / "experiment"
    names = [file.relative_to(root).with_suffix("").as_posix() for file in root.rglob("*.yaml") if _is_table(file)]
    return sorted(names, key=lambda name: (name.count("/"), name))


def load_table(name: str, overrides: Sequence[str] = (), conf: Path | None = None) -> Table:
    """Compose the jobs of the table `name`, as a multirun of `extract.py` would.

    Args:
        name: of its experiment.
        overrides: as for `extract.py`; those of swept keys change nothing, a table has all its rows.
        conf: folder of the configuration.

    Raises:
        ConfigError: there is no such table, its description is wrong, or overrides do not fit it.
    """
    conf = conf or conf_dir()
    if name not in table_names(conf):
        raise ConfigError(f"table: expected one of {', '.join(table_names(conf)) or 'none'}, found {name}")
    with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        spec, swept = _describe(name)
        settings = settings_beside(name, overrides, swept)
        cells = tuple(_cells(name, swept, settings))
        changed = tuple(filter(may_decide, settings))
        plain = _cells(name, swept, [each for each in settings if each not in changed]) if changed else iter(cells)
        if all(_asked(one) == _asked(other) for one, other in zip(cells, plain, strict=True)):  # up to a difference
            changed = ()
    return Table(name, spec, cells, changed)


def descriptions(conf: Path | None = None) -> dict[str, tuple[TableSpec, dict[str, list[str]]]]:
    """Name → description, and swept keys with their values, of every table below `conf`.

    Raises:
        ConfigError: a description is wrong.
    """
    conf = conf or conf_dir()
    with initialize_config_dir(str(conf.absolute()), version_base="1.3"):
        return {name: _describe(name) for name in table_names(conf)}


def _describe(name: str) -> tuple[TableSpec, dict[str, list[str]]]:
    hydra: Any = _composed([f"experiment={name}"], return_hydra_config=True).hydra
    described = plain(hydra.callbacks.table)
    swept = {SEED: ["0"], **_swept(OmegaConf.to_container(hydra.sweeper.params) or {})}
    spec = load_config(TableSpec, {key: value for key, value in described.items() if key != "_target_"})
    axes = [key for key in swept if key != SEED]
    if axes != list(spec.axes):
        raise ConfigError(
            f"table {name}: expected an axis for every key of hydra.sweeper.params but {SEED}, in their order "
            f"({', '.join(axes)}), found {', '.join(spec.axes)}"
        )
    return spec, swept


def _is_table(file: Path) -> bool:
    content: Any = yaml_content(file)
    for key in ("hydra", "callbacks", "table"):
        content = content.get(key) if isinstance(content, dict) else None
    return content is not None


def _swept(params: Any) -> dict[str, list[str]]:
    """Key → values; Hydra's own parser, so `1,2`, `range(1,5)` and `choice(a,b)` mean what they mean in a sweep."""
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    return {
        override.get_key_element(): [_as_yaml(value) for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [override.get_value_element_as_str()]
        for override in parsed
    }


def _as_yaml(value: str) -> str:
    """Hydra's iterator gives booleans as Python has them."""
    return value.lower() if value in ("True", "False") else value


def _cells(name: str, swept: dict[str, list[str]], settings: list[str]) -> Iterator[Cell]:
    axes = {axis: values for axis, values in swept.items() if axis != SEED}
    seeds = [int(seed) for seed in swept[SEED]]
    common = [f"experiment={name}", *settings]
    return (_cell(dict(zip(axes, values, strict=True)), seeds, common) for values in product(*axes.values()))


def _cell(values: dict[str, str], seeds: list[int], common: list[str]) -> Cell:
    """Composed once; nothing but the seed differs between its jobs."""
    own = [f"{key}={value}" for key, value in values.items()]
    container = plain(_composed([*common, *own]))
    return Cell(values, {seed: load_config(ExtractConfig, {**container, SEED: seed}) for seed in seeds})


def _composed(overrides: list[str], *, return_hydra_config: bool = False) -> DictConfig:
    try:
        return compose("extract", overrides=overrides, return_hydra_config=return_hydra_config)
    except HydraException as error:
        known = key_advice(str(error), lambda: ExtractConfig) or option_advice(str(error))
        raise ConfigError(known or f"{' '.join(overrides)}: {error}") from None


def _asked(cell: Cell) -> tuple[str, int | None]:
    """What decides the figures of a cell: the address of its first job, and the memory that its search may hold."""
    from hagd.pipeline.job_key import job_key

    first = next(iter(cell.configs.values()))
    return job_key(first), first.search.memory_limit_mb
