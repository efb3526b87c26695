from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from hagd.tables.formats import cells, csv_text, escape_latex, latex, markdown, write_files
from hagd.tables.terminal import duration, print_view
from hagd.tables.view import View, view
from tests.tables.cases import SPEC, finished, table, with_runs

NEAR = {"control__random__preservation": 0.5, "circuit__nodes": 1234.0}


@pytest.fixture
def seen() -> View:
    row = {"search.pruning": "true", "task": "sorting"}
    tiny = table(published=[{**SPEC["published"][0], "row": row}, SPEC["published"][1]])
    runs = {
        0: finished("x_1", validation__preservation=0.5, **NEAR),
        1: finished("y_1", validation__preservation=0.7, **NEAR),
        2: finished("z_1", circuit__nodes=1236.0),
    }
    return view(tiny, with_runs(tiny, runs, {}))


def test_markdown(seen: View) -> None:
    text = markdown(seen)
    lines = text.splitlines()
    assert lines[0] == "## Tiny & small"
    assert lines[2] == "| pruning | task | n | φ | nodes | published |"
    assert lines[4] == (
        "| with | sorting | 3 | 0.60 ± 0.14 (n = 2)<sup>r</sup> | 1,235 ± 1 | "
        "φ 0.97<sup>[1]</sup>, nodes 47<sup>[1]</sup> |"
    )
    assert lines[5] == "| without | sorting | 0 of 3 | – | – | – |"
    assert lines[6] == "| with | ioi | – | not run: needs 70_B parameters | – | – |"
    assert lines[7] == "| language_tasks |  | – | – | – | φ 0.74–0.88<sup>[2]</sup> |"
    assert "<sup>[1]</sup> Published, not ours: GPT-2 Small: Table II." in lines
    assert any("<sup>r</sup> random nodes" in line for line in lines)


def test_latex_is_escaped_ascii_with_equal_columns(seen: View) -> None:
    text = latex(seen)
    assert text.isascii()
    assert r"\caption{Tiny \& small}" in text and r"language\_tasks" in text and r"100 \% plain" in text
    assert r"0.60 $\pm$ 0.14 (n = 2)\textsuperscript{r}" in text
    body = text.split(r"\midrule")[1].split(r"\bottomrule")[0].strip().splitlines()
    assert len(body) == 4
    for line in body:
        columns = re.findall(r"(?<!\\)&", line)
        spanned = re.search(r"\\multicolumn\{(\d)\}", line)
        assert len(columns) + (int(spanned[1]) - 1 if spanned else 0) == 5, line
    assert r"\multicolumn{2}{l}{not run: needs 70\_B parameters} & -- \\" in body[2]
    bare = text.replace(r"\{", "").replace(r"\}", "")
    assert bare.count("{") == bare.count("}") and text.count(r"\begin") == text.count(r"\end")


@pytest.mark.parametrize("character", "&%$#_{}~^\\")
def test_special_characters_are_escaped(character: str) -> None:
    assert re.fullmatch(r"a(\\[&%$#_{}]|\\text[a-z]+\{\})b", escape_latex(f"a{character}b"))


def test_csv_keeps_published_figures_apart(seen: View) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_text(seen))))
    measured = [line for line in lines if line["record"] == "measured"]
    published = [line for line in lines if line["record"] == "published"]
    assert [line["figure"] for line in measured] == ["φ", "nodes"]
    assert float(measured[0]["value"]) == pytest.approx(0.6) and measured[0]["n"] == "2" and measured[0]["marks"] == "r"
    assert measured[0]["runs"] == "x_1 y_1 z_1" and measured[0]["wandb"] == "wandb/x_1 wandb/y_1 wandb/z_1"
    assert not measured[0]["source"] and not measured[0]["text"]
    assert [(line["figure"], line["text"]) for line in published] == [
        ("φ", "0.97"),
        ("nodes", "47"),
        ("φ", "0.74–0.88"),
    ]
    assert all(line["source"] and not line["value"] and not line["runs"] for line in published)
    (absent,) = (line for line in lines if line["record"] == "not run")
    assert absent["text"] == "needs 70_B parameters" and not absent["value"]


def test_terminal(seen: View) -> None:
    text = "\n".join(printed(seen, 120))
    assert "0.60 ± 0.14 (n = 2) r" in text and "0 of 3" in text
    assert "with, ioi: not run: needs 70_B parameters." in text
    assert "[1] Published, not ours: GPT-2 Small: Table II." in text


@pytest.mark.parametrize(("width", "n_tables"), [(120, 1), (50, 3)])
def test_what_a_narrow_terminal_has_no_room_for_follows(seen: View, width: int, n_tables: int) -> None:
    """Every figure whole and on one line, in as few tables as hold them, each with the labels."""
    lines = printed(seen, width)
    figures = [cell for row in seen.rows for cell in cells(seen, row, lambda mark: f" {mark}")[2:5]]
    assert all(any(figure in line for line in lines) for figure in figures if "not run" not in figure)
    assert sum(set(line.strip()) == {"─"} for line in lines) == n_tables
    assert sum(line.split()[:2] == ["pruning", "task"] for line in lines) == n_tables


def test_what_no_line_holds_is_folded(seen: View) -> None:
    text = "".join("".join(printed(seen, 30)).split())
    assert all(part in text for part in ("0.60±", "0.14", "1,235", "0of3", "0.74–0.88"))


def printed(view: View, width: int) -> list[str]:
    console = Console(width=width, record=True, file=io.StringIO())
    print_view(view, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= width
    return lines


def test_written_files(seen: View, tmp_path: Path) -> None:
    files = write_files(seen, tmp_path / "new", "quick_tiny")
    assert [file.name for file in files] == ["quick_tiny.md", "quick_tiny.tex", "quick_tiny.csv"]
    assert files[0].read_text() == markdown(seen) and files[2].read_text() == csv_text(seen)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (None, 12.4, 599, 1800)] == ["unknown", "12 s", "599 s", "30 min"]
