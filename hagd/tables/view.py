"""A table with what is there: measured cells, empty ones, rows that cannot run, published figures in their columns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from hagd.errors import ConfigError
from hagd.pipeline.job_key import job_key
from hagd.tables.definition import Cell, Column, Parts, Published, Table
from hagd.tables.runs import FinishedRun, StoppedRun
from hagd.tables.statistics import Exponent, Measured, exponent, measure


@dataclass(frozen=True)
class CellRuns:
    """A cell and its runs.

    Attributes:
        cell: what was asked for.
        keys: seed → address of the job.
        done: seed → its finished run.
        stopped: seed → its run that held more memory than the table allows.
    """

    cell: Cell
    keys: dict[int, str]
    done: dict[int, FinishedRun]
    stopped: dict[int, StoppedRun]

    @property
    def missing(self) -> tuple[int, ...]:
        """Seeds that neither finished nor were stopped."""
        return tuple(seed for seed in self.keys if seed not in self.done and seed not in self.stopped)


@dataclass(frozen=True)
class Quoted:
    """A published figure: its name, text that nothing is computed with, the number of its source in `View.sources`."""

    label: str
    text: str
    source: int


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        labels: one an axis that varies.
        measured: one a column of ours; None where nothing was measured.
        quoted: published figures that stand beside it.
        seeds: finished ones; None for rows that are not run.
        asked: how many seeds the table asks for.
        needs: what a row that cannot run here would need, else None.
        folders: run folder of each finished seed, relative to `paths.runs`.
        tracked: W&B run of each that has one.
        stopped: runs that held too much memory.
    """

    labels: tuple[str, ...]
    measured: tuple[Measured | None, ...]
    quoted: tuple[Quoted, ...]
    seeds: tuple[int, ...] | None = None
    asked: int = 0
    needs: str | None = None
    folders: tuple[str, ...] = ()
    tracked: tuple[str, ...] = ()
    stopped: tuple[StoppedRun, ...] = ()


@dataclass(frozen=True)
class View:
    """Everything that is shown of a table.

    Attributes:
        name: of its experiment.
        title: one line.
        note: what a reader must know.
        changed: settings other than the experiment's.
        axes: heads of the labels.
        columns: our figures.
        rows: as shown.
        controls: mark → what the control is.
        sources: of the published figures, numbered from 1.
        fits: y, x, and how y grows with x over all finished runs.
        fixed: axis label → value, of axes with one value.
    """

    name: str
    title: str
    note: str
    changed: tuple[str, ...]
    axes: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    controls: dict[str, str]
    sources: tuple[str, ...]
    fits: tuple[tuple[str, str, Exponent | None], ...]
    fixed: dict[str, str]


def match_runs(table: Table, runs: Mapping[str, FinishedRun], stopped: Mapping[str, StoppedRun]) -> list[CellRuns]:
    """Each cell of the table with the runs that it asks for.

    A job that was stopped counts as long as it held more than its `search.memory_limit_mb` in the table.
    """
    found = []
    for cell in table.cells:
        keys = {seed: job_key(config) for seed, config in cell.configs.items()}
        done = {seed: runs[key] for seed, key in keys.items() if key in runs}
        beyond = {seed: stopped[key] for seed, key in keys.items() if key in stopped and seed not in done}
        limits = {seed: config.search.memory_limit_mb for seed, config in cell.configs.items()}
        found.append(
            CellRuns(cell, keys, done, {s: run for s, run in beyond.items() if run.peak_mb > (limits[s] or math.inf)})
        )
    return found


def view(table: Table, cells: Sequence[CellRuns]) -> View:
    """Put the table together.

    Raises:
        ConfigError: a published figure belongs to more than one row.
    """
    spec, rows = table.spec, _Rows(table, cells)
    done = [run.metrics for each in cells for run in each.done.values()]
    return View(
        name=table.name,
        title=spec.title,
        note=spec.note,
        changed=table.changed,
        axes=(*(spec.axes[axis].label for axis in rows.shown), *([spec.parts.label] if spec.parts else [])),
        columns=tuple(spec.columns.values()),
        rows=(*rows.measured(), *rows.not_run(), *rows.published()),
        controls=spec.controls,
        sources=tuple(rows.sources),
        fits=tuple(
            (spec.columns[fit.column].label, fit.label, exponent(done, fit.x, spec.columns[fit.column].metric))
            for fit in spec.fits
        ),
        fixed=rows.fixed(),
    )


class _Rows:
    """The rows of a table: ours, those that are not run, and published figures that stand beside none of them."""

    def __init__(self, table: Table, cells: Sequence[CellRuns]) -> None:
        self.spec, self.cells = table.spec, cells
        self.settings = [each.cell.values for each in cells] + [each.row for each in table.spec.not_run]
        varying = [axis for axis in self.spec.axes if len({values.get(axis) for values in self.settings}) > 1]
        self.shown = varying or list(self.spec.axes)
        self.sources = list(dict.fromkeys(_source(each) for each in self.spec.published))
        self._place = [_beside(table, each, self.settings) for each in self.spec.published]

    def measured(self) -> Iterator[Row]:
        parts = _parts(self.spec.parts)
        for (number, each), part in product(enumerate(self.cells), parts):
            metrics = [run.metrics for run in each.done.values()]
            yield Row(
                labels=self._labels(each.cell.values, part),
                measured=tuple(_measure(metrics, column, part) for column in self.spec.columns.values()),
                quoted=self._beside(number) if part == parts[0] else (),
                seeds=tuple(each.done),
                asked=len(each.keys),
                folders=tuple(run.below_runs(run.folder) for run in each.done.values()),
                tracked=tuple(run.below_runs(run.tracked) for run in each.done.values() if run.tracked),
                stopped=tuple(each.stopped.values()),
            )

    def not_run(self) -> Iterator[Row]:
        for number, each in enumerate(self.spec.not_run, start=len(self.cells)):
            yield Row(self._labels(each.row), self._nothing, self._beside(number), needs=each.needs)

    def published(self) -> Iterator[Row]:
        for each, place in zip(self.spec.published, self._place, strict=True):
            if place is None:
                others = len(self.shown) - 1 + (self.spec.parts is not None)
                yield Row((each.of, *[""] * others), self._nothing, self._quoted(each))

    def fixed(self) -> dict[str, str]:
        """Axis label → value, of axes with one value."""
        first = self.settings[0]
        axes = {axis: shown for axis, shown in self.spec.axes.items() if axis not in self.shown}
        return {shown.label: shown.values.get(first[axis], first[axis]) for axis, shown in axes.items()}

    @property
    def _nothing(self) -> tuple[None, ...]:
        return (None,) * len(self.spec.columns)

    def _labels(self, values: Mapping[str, str], part: str = "") -> tuple[str, ...]:
        """With parts, the last label is that of the part; empty in rows that are not run."""
        axes = (self.spec.axes[axis].values.get(values.get(axis, ""), values.get(axis, "")) for axis in self.shown)
        return (*axes, *([self.spec.parts.values.get(part, "")] if self.spec.parts else []))

    def _beside(self, row: int) -> tuple[Quoted, ...]:
        here = [each for each, place in zip(self.spec.published, self._place, strict=True) if place == row]
        return tuple(figure for each in here for figure in self._quoted(each))

    def _quoted(self, published: Published) -> tuple[Quoted, ...]:
        source = self.sources.index(_source(published)) + 1
        return tuple(Quoted(self.spec.columns[name].label, text, source) for name, text in published.figures.items())


def _parts(parts: Parts | None) -> Sequence[str]:
    return [""] if parts is None else list(parts.values)


def _measure(metrics: Sequence[Mapping[str, float]], column: Column, part: str) -> Measured | None:
    controls = {mark: metric.replace("{part}", part) for mark, metric in column.controls.items()}
    return measure(metrics, column.metric.replace("{part}", part), controls)


def _source(published: Published) -> str:
    return f"{published.of}: {published.source}"


def _beside(table: Table, published: Published, rows: list[dict[str, str]]) -> int | None:
    """Number of the row that a published figure belongs to; None when it has a row of its own."""
    if published.row is None:
        return None
    wanted = published.row
    found = [i for i, values in enumerate(rows) if all(values.get(axis) == value for axis, value in wanted.items())]
    if len(found) > 1:
        raise ConfigError(
            f"table {table.name}: expected a published figure to belong to one row, found {len(found)} rows for "
            f"{wanted}; name more of the axes {', '.join(table.spec.axes)}"
        )
    return found[0] if found else None
