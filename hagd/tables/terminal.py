"""Tables on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable

from hagd.tables.cost import Estimate
from hagd.tables.formats import cells, footnotes, header, not_run
from hagd.tables.view import CellRuns, View


def print_view(view: View, console: Console) -> None:
    """The table with its notes; rows without runs of ours are dimmed."""
    shown = RichTable(title=escape(view.title), box=box.SIMPLE_HEAD, pad_edge=False)
    n_labels = len(view.axes)
    for number, head in enumerate(header(view)):
        ours = n_labels <= number <= n_labels + len(view.columns)
        shown.add_column(
            escape(head),
            justify="right" if ours else "left",
            overflow="fold",
            min_width=max(map(len, head.split())),
        )
    for row in view.rows:
        texts = cells(view, row, lambda mark: f" {mark}")
        if row.needs is not None:
            texts[n_labels + 1] = "not run"  # why is printed below: a cell has no room for it
        shown.add_row(*map(escape, texts), style="dim" if row.seeds is None else None)
    console.print(shown)
    reasons = [f"{', '.join(row.labels)}: {not_run(row)}." for row in view.rows if row.needs is not None]
    for note in [*footnotes(view, str), *reasons]:
        console.print(escape(note), style="dim", highlight=False)


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
