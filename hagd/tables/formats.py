"""A table as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from hagd.tables.statistics import Exponent, Measured
from hagd.tables.view import Quoted, Row, View

Marker = Callable[[str], str]
"""Raises a mark or the number of a source above the line."""

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "≥": r"$\ge$",
    "–": "--",
    "…": r"\dots{}",
    "’": "'",
    "φ": r"$\varphi$",
    "λ": r"$\lambda$",
    "²": "$^2$",
}


def number(value: float, digits: int) -> str:
    """With `digits` decimals, thousands separated."""
    return f"{value:,.{digits}f}"


def measured_text(cell: Measured | None, digits: int, seeds: int, raised: Marker) -> str:
    """`mean ± spread`, the number of values where it is not that of the row's seeds, and the marks."""
    if cell is None:
        return "–"
    text = number(cell.mean, digits)
    if cell.sd is not None:
        text += f" ± {number(cell.sd, digits)}"
    if cell.n != seeds:
        text += f" (n = {cell.n})"
    return text + (raised(",".join(cell.marks)) if cell.marks else "")


def quoted_text(quoted: Sequence[Quoted], raised: Marker) -> str:
    """Published figures of a row, each with its name and the number of its source."""
    return ", ".join(f"{each.label} {each.text}{raised(f'[{each.source}]')}" for each in quoted) or "–"


def out_of_memory(row: Row) -> str:
    """What stands in place of the figures of a row whose runs were stopped."""
    worst = max(row.stopped, key=lambda run: run.peak_mb)
    return f"out of memory ({worst.peak_mb:,.0f} MB, limit {worst.limit_mb:,.0f} MB)"


def header(view: View) -> list[str]:
    """Heads of all columns: labels, number of seeds, ours, and one for what is published."""
    published = ["published"] if view.sources else []
    return [*view.axes, "n", *(column.label for column in view.columns), *published]


def cells(view: View, row: Row, raised: Marker) -> list[str]:
    """One text a column of `header`; a row without runs says why in the first column of figures."""
    ours = [
        measured_text(cell, column.digits, len(row.seeds or ()), raised)
        for cell, column in zip(row.measured, view.columns, strict=True)
    ]
    if row.needs is not None:
        ours[0] = not_run(row)
    elif row.stopped and not row.seeds:
        ours[0] = out_of_memory(row)
    published = [quoted_text(row.quoted, raised)] if view.sources else []
    return [*row.labels, count(row), *ours, *published]


def not_run(row: Row) -> str:
    """What stands in place of the figures of a row that cannot run here."""
    return f"not run: needs {row.needs}"


def count(row: Row) -> str:
    """Finished seeds, and of how many while some are missing."""
    if row.seeds is None:
        return "–"
    done = len(row.seeds)
    stopped = f", {len(row.stopped)} out of memory" if row.stopped else ""
    return str(done) if done == row.asked else f"{done} of {row.asked}{stopped}"


def footnotes(view: View, raised: Marker) -> list[str]:
    """What the table means, one paragraph each."""
    parts = [view.note.strip()] if view.note.strip() else []
    if view.changed:
        parts.append(f"Settings other than the experiment’s: {' '.join(view.changed)}.")
    if view.fixed:
        parts.append("; ".join(f"{label}: {value}" for label, value in view.fixed.items()) + ".")
    parts.append("n: seeds. Cells: mean ± standard deviation over seeds.")
    if view.controls:
        marks = "; ".join(f"{raised(mark)} {text}" for mark, text in view.controls.items())
        parts.append(
            "Marked where the 95 % interval (Student’s over seeds; for one seed the bootstrap over prompts) is not "
            f"shown to lie above that of a control in the same runs: {marks}."
        )
    if view.fits:
        parts.append("Least squares through the logarithms of all runs: " + "; ".join(map(_fit, view.fits)) + ".")
    parts += [f"{raised(f'[{i}]')} Published, not ours: {source}." for i, source in enumerate(view.sources, start=1)]
    return parts


def _fit(fit: tuple[str, str, Exponent | None]) -> str:
    y, x, found = fit
    if found is None:
        return f"{y} over {x}: not enough runs"
    interval = "" if found.interval is None else f" [{found.interval[0]:.2f}, {found.interval[1]:.2f}]"
    return f"{y} grows with the power {found.value:.2f}{interval} of {x} (n = {found.n})"


def markdown(view: View) -> str:
    """A GitHub table under its title, with footnotes."""

    def raised(mark: str) -> str:
        return f"<sup>{mark}</sup>"

    heads = header(view)
    lines = [heads, ["---"] * len(heads), *(cells(view, row, raised) for row in view.rows)]
    body = "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)
    notes = "".join(f"\n{note}\n" for note in footnotes(view, raised))
    return f"## {view.title}\n\n{body}{notes}"


def latex(view: View) -> str:
    """A `table` environment for the package booktabs; ASCII."""

    def line(texts: list[str]) -> str:
        return " & ".join(_latex_text(text) for text in texts) + r" \\"

    def body(row: Row) -> str:
        texts = cells(view, row, _raised)
        if row.needs is None and (row.seeds or not row.stopped):
            return line(texts)
        first, last = labels + 1, labels + 1 + len(view.columns)
        wide = rf"\multicolumn{{{last - first}}}{{l}}{{{_latex_text(texts[first])}}}"
        return " & ".join([*map(_latex_text, texts[:first]), wide, *map(_latex_text, texts[last:])]) + r" \\"

    labels = len(view.axes)
    notes = r" \\ ".join(_latex_text(note) for note in footnotes(view, _raised))
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{escape_latex(view.title)}}}",
            rf"\begin{{tabular}}{{{'l' * labels}{'r' * (1 + len(view.columns))}{'l' * bool(view.sources)}}}",
            r"\toprule",
            line(header(view)),
            r"\midrule",
            *map(body, view.rows),
            r"\bottomrule",
            r"\end{tabular}",
            rf"\par\footnotesize {notes}",
            r"\end{table}",
            "",
        ]
    )


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is written here."""
    return "".join(_LATEX.get(character, character) for character in text)


def _raised(mark: str) -> str:
    """Survives escaping; control characters do not occur in text."""
    return f"\x02{mark}\x03"


def _latex_text(text: str) -> str:
    return escape_latex(text).replace("\x02", r"\textsuperscript{").replace("\x03", "}")


Line = list[str | float | int | None]
_STATISTICS = ("value", "sd", "n", "low", "high", "marks")


def long_rows(view: View) -> tuple[list[str], list[Line]]:
    """One line a figure, for CSV and W&B; published ones are marked as such and have no statistics."""
    heads = [*view.axes, "record", "figure", *_STATISTICS, "text", "source", "runs", "wandb"]
    return heads, [[*row.labels, *line] for row in view.rows for line in _lines(view, row)]


def _lines(view: View, row: Row) -> Iterator[Line]:
    empty: Line = [None] * len(_STATISTICS)
    for column, cell in zip(view.columns, row.measured, strict=True):
        if cell is not None:
            statistics: Line = [cell.mean, cell.sd, cell.n, *(cell.interval or (None, None)), ",".join(cell.marks)]
            yield ["measured", column.label, *statistics, None, None, " ".join(row.folders), " ".join(row.tracked)]
    for quoted in row.quoted:
        yield ["published", quoted.label, *empty, quoted.text, view.sources[quoted.source - 1], None, None]
    for run in row.stopped:
        held: Line = [run.peak_mb, None, 1, None, None, None]
        yield ["out of memory", "memory held [MB]", *held, f"limit {run.limit_mb:.0f} MB", None, None, None]
    if row.needs is not None:
        yield ["not run", None, *empty, f"needs {row.needs}", None, None, None]


def csv_text(view: View) -> str:
    """`long_rows` as CSV."""
    heads, lines = long_rows(view)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows(lines)
    return out.getvalue()


def write_files(view: View, folder: Path, name: str) -> list[Path]:
    """`name.md`, `name.tex` and `name.csv` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, text in ((".md", markdown(view)), (".tex", latex(view)), (".csv", csv_text(view))):
        file = folder / f"{name}{suffix}"
        file.write_text(text, encoding="utf-8")
        written.append(file)
    return written
