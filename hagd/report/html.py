"""One self-contained page per extraction: no network, no other files."""

from __future__ import annotations

import os
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from hagd.report import fragments
from hagd.report.chart import curve_charts
from hagd.report.payload import embed, payload
from hagd.report.records import ReportData
from hagd.report.wording import headline, warnings

SCRIPTS = ("model.js", "layout.js", "canvas.js", "details.js", "report.js")
"""In the order in which they run; `report.js` starts the page."""


def write_report(data: ReportData, path: Path) -> None:
    """Write the page to `path`, replacing an earlier one only when the new one is complete.

    Args:
        data: results of one extraction.
        path: where `report.html` goes; its folder is made if missing.
    """
    publish(render(data), path)


def publish(page: str, path: Path) -> None:
    """Write a page to `path` as a whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)


def render(data: ReportData) -> str:
    """The page as text."""
    run = f"{data.model} · {data.task} · seed {data.seed}"
    return Template(asset("report.html")).substitute(
        head=page_head(f"Circuit: {run}"),
        run=escape(run),
        headline=escape(headline(data)),
        verdict=fragments.verdict_line(data),
        warnings=fragments.warning_lines(warnings(data)),
        controls=fragments.comparison_bars(data),
        curves=curve_charts(data) + fragments.curve_table(data),
        view=circuit_view(
            "Circuit", "Circuit size", "chooses among the circuits that the search found at several sizes"
        ),
        search=fragments.search_table(data),
        reconstruction=fragments.reconstruction_table(data.reconstruction, data.slot_names),
        hierarchy=fragments.hierarchy_table(data),
        metrics=fragments.metrics_table(data),
        settings=fragments.settings_table(data.settings),
        data=embed(payload(data)),
        scripts=scripts(),
    )


def page_head(title: str) -> str:
    """Everything before a page's own content: encoding, policy, title, style."""
    return Template(asset("page_head.html")).substitute(title=escape(title), style=asset("report.css"))


def circuit_view(title: str, slider: str, does: str) -> str:
    """The section that shows nodes and edges, with the name of the size slider and what it does."""
    return Template(asset("circuit_view.html")).substitute(
        title=escape(title), slider=escape(slider), does=escape(does)
    )


def scripts() -> str:
    """The page's own scripts, in the order in which they run."""
    return "\n".join(f"<script>\n{asset(name)}</script>" for name in SCRIPTS)


def asset(name: str) -> str:
    """A file of the page, as text."""
    return (files("hagd.report") / "assets" / name).read_text(encoding="utf-8")
