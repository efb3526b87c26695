from __future__ import annotations

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser

from hagd.report.html import publish
from hagd.report.table_page import Cell, table_page
from tests.report.test_html import Page

ROWS = (
    (Cell("seed=10", link="10/report.html"), Cell("0.90", 0.9), Cell("done")),
    (Cell("seed=9", link='9/"<b>.html'), Cell("–", None), Cell("failed: <b>")),
    (Cell("seed=2"), Cell("0.95", 0.95), Cell("done")),
)


def test_cells_are_escaped_and_linked() -> None:
    page = Page(table_page("T & <t>", ("job", "φ", "status"), ROWS, lead="3 jobs"))
    assert [a["href"] for tag, a in page.elements if tag == "a"] == ["10/report.html", '9/"<b>.html']
    assert [a["data-value"] for tag, a in page.elements if "data-value" in a] == ["0.9", "0.95"]
    assert "failed: <b>" in page.words and "3 jobs" in page.words and len(page.scripts) == 1


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected rows of 2 cells, found others at \[0, 1, 2\]"):
        table_page("t", ("a", "b"), ROWS)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_headings_sort_by_value_and_back(tmp_path: Path) -> None:
    publish(table_page("t", ("job", "φ", "status"), ROWS), tmp_path / "table.html")
    jobs = "Array.from(document.querySelectorAll('tbody tr'), (row) => row.cells[0].textContent)"
    sorted_by = "Array.from(document.querySelectorAll('th'), (each) => each.ariaSort)"
    with Browser() as page:
        page.open(tmp_path / "table.html")
        for _ in range(2):
            page.press("Tab")
        page.press("Enter")
        assert page.run("document.activeElement.textContent") == "φ"
        assert page.run(jobs) == ["seed=10", "seed=2", "seed=9"] and page.run(sorted_by) == [None, "ascending", None]
        page.press("Enter")
        assert page.run(jobs) == ["seed=2", "seed=10", "seed=9"], "cells without a value stay last"
        page.run("document.querySelector('th button').click()")
        assert page.run(jobs) == ["seed=2", "seed=9", "seed=10"], "numbers in names by value"
        assert page.errors == [] and page.requests == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome on the PATH")
def test_names_of_runs_stay_in_one_piece(tmp_path: Path) -> None:
    row = (Cell("lr=0.1 seed=10", link="10/report.html"), *[Cell("0.95", 0.95)] * 20, Cell("zk5rdu1r", link="run"))
    publish(table_page("t", ("job", *["φ"] * 20, "run"), [row]), tmp_path / "table.html")
    lines = "Array.from(document.querySelectorAll('td a'), (link) => link.getClientRects().length)"
    with Browser() as page:
        page.open(tmp_path / "table.html")
        assert page.run(lines) == [2, 1]
