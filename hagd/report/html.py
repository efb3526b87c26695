"""One self-contained page per extraction: no network, no other files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from hagd.report import fragments
from hagd.report.chart import curve_charts
from hagd.report.payload import embed, payload
from hagd.report.records import ReportData
from hagd.report.wording import headline

SCRIPTS = ("model.js", "layout.js", "canvas.js", "details.js", "report.js")
"""In the order in which they run; `report.js` starts the page."""


def write_report(data: ReportData, figures: Sequence[Path], path: Path) -> None:
    """Write the page to `path`, replacing an earlier one only when the new one is complete.

    Args:
        data: results of one extraction.
        figures: PNG files to embed (`write_figures` returns them).
        path: where `report.html` goes; its folder is made if missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(render(data, figures), encoding="utf-8")
    os.replace(unfinished, path)


def render(data: ReportData, figures: Sequence[Path] = ()) -> str:
    """The page as text."""
    run = f"{data.model} · {data.task} · seed {data.seed}"
    return Template(_asset("report.html")).substitute(
        title=escape(f"HAGD circuit: {run}"),
        style=_asset("report.css"),
        run=escape(run),
        headline=escape(headline(data)),
        verdict=fragments.verdict_line(data),
        warnings=fragments.warning_lines(data),
        controls=fragments.comparison_bars(data),
        curves=curve_charts(data) + fragments.curve_table(data),
        search=fragments.search_table(data),
        reconstruction=fragments.reconstruction_table(data),
        hierarchy=fragments.hierarchy_table(data),
        metrics=fragments.metrics_table(data),
        settings=fragments.settings_table(data),
        figures=fragments.figure_section(figures),
        data=embed(payload(data)),
        scripts="\n".join(f"<script>\n{_asset(name)}</script>" for name in SCRIPTS),
    )


def _asset(name: str) -> str:
    return (files("hagd.report") / "assets" / name).read_text(encoding="utf-8")
