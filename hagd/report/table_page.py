"""A table as a page of its own: sortable, its cells linked to the reports of their runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from string import Template

from hagd.report.html import asset, page_head


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: what is shown.
        value: what it sorts by; None: its text, after all values.
        link: address relative to the page, of the report behind the cell; None without one.
    """

    text: str
    value: float | None = None
    link: str | None = None


def table_page(title: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], lead: str = "") -> str:
    """The page as text; a column whose cells have values is set flush right and sorts by them.

    Raises:
        ValueError: a row has more or fewer cells than there are columns.
    """
    wrong = [i for i, row in enumerate(rows) if len(row) != len(columns)]
    if wrong:
        raise ValueError(f"table {title!r}: expected rows of {len(columns)} cells, found others at {wrong[:5]}")
    kind = ["" if any(row[i].value is not None for row in rows) else ' class="text"' for i in range(len(columns))]
    head = "".join(
        f'<th scope="col"{style}><button type="button" class="link">{escape(name)}</button></th>'
        for name, style in zip(columns, kind, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, row, kind))}</tr>\n" for row in rows)
    return Template(asset("table.html")).substitute(
        head=page_head(title), title=escape(title), lead=escape(lead), columns=head, rows=body, script=asset("table.js")
    )


def _cell(cell: Cell, kind: str) -> str:
    value = "" if cell.value is None else f' data-value="{cell.value!r}"'
    text = escape(cell.text)
    shown = text if cell.link is None else f'<a class="link" href="{escape(cell.link)}">{text}</a>'
    return f"<td{kind}{value}>{shown}</td>"
