"""Tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from hagd.tables.cost import Estimate
from hagd.tables.formats import cells, footnotes, header, not_run
from hagd.tables.view import CellRuns, View

_ANY_WIDTH = 10**6
"""Wider than every table."""


def print_view(view: View, console: Console) -> None:
    """The table with its notes; rows without runs of ours are dimmed.

    Columns that the console has no room for follow in further tables, with the labels of the rows again.
    """
    title = escape(view.title)
    for columns in _parts(view, console):
        console.print(_table(view, columns, title, whole=_fits(view, columns, console)))
        title = ""
    reasons = [f"{', '.join(row.labels)}: {not_run(row)}." for row in view.rows if row.needs is not None]
    for note in [*footnotes(view, str), *reasons]:
        console.print(escape(note), style="dim", highlight=False)


def _parts(view: View, console: Console) -> list[list[int]]:
    """Columns beside the labels, as many at a time as fit, and never fewer than one."""
    parts: list[list[int]] = []
    for column in range(len(view.axes), len(header(view))):
        wider = [*parts[-1], column] if parts else [column]
        if parts and _fits(view, wider, console):
            parts[-1] = wider
        else:
            parts.append([column])
    return parts


def _fits(view: View, columns: list[int], console: Console) -> bool:
    options = console.options.update(max_width=_ANY_WIDTH)
    return console.measure(_table(view, columns), options=options).minimum <= console.width


def _table(view: View, columns: list[int], title: str = "", whole: bool = True) -> RichTable:
    """The labels and these columns; figures stay on one line, and words are kept, where they can be whole."""
    n_labels = len(view.axes)
    heads, shown = header(view), [*range(n_labels), *columns]
    rows = []
    for row in view.rows:
        texts = cells(view, row, lambda mark: f" {mark}")
        if row.needs is not None:
            texts[n_labels + 1] = "not run"  # why is printed below: a cell has no room for it
        rows.append(texts)
    table = RichTable(title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for number in shown:
        ours = n_labels <= number <= n_labels + len(view.columns)
        lines = [row[number] for row in rows] if ours else [word for row in rows for word in row[number].split()]
        table.add_column(
            escape(heads[number]),
            justify="right" if ours else "left",
            overflow="fold",
            min_width=max(map(len, [*heads[number].split(), *lines])) if whole else None,
        )
    for row, texts in zip(view.rows, rows, strict=True):
        table.add_row(*(escape(texts[number]) for number in shown), style="dim" if row.seeds is None else None)
    return table


def print_cells(cells_: list[CellRuns], estimates: dict[tuple[int, int], Estimate], console: Console) -> None:
    """Every cell: seeds done, seeds missing and what each would cost.

    Args:
        cells_: of one table.
        estimates: (number of the cell, seed) → cost of that missing job.
        console: where it is printed.
    """
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for head in ("cell", "done", "missing", "seconds each"):
        shown.add_column(head, overflow="fold")
    for number, each in enumerate(cells_):
        shown.add_row(
            escape(" ".join(f"{axis}={value}" for axis, value in each.cell.values.items())),
            escape(_seeds(tuple(each.done))),
            escape(_seeds(each.missing)),
            ", ".join(duration(estimates[number, seed].seconds) for seed in each.missing) or "–",
        )
    console.print(shown)


def duration(seconds: float | None) -> str:
    """`unknown`, seconds below ten minutes, else minutes."""
    if seconds is None:
        return "unknown"
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _seeds(seeds: tuple[int, ...]) -> str:
    return "seeds " + ", ".join(map(str, seeds)) if seeds else "–"
