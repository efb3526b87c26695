from __future__ import annotations

import pytest

from hagd.errors import ConfigError
from hagd.tables.formats import markdown
from hagd.tables.statistics import Measured
from hagd.tables.view import Quoted, view
from tests.tables.cases import SPEC, finished, table, with_runs

DONE = {
    0: finished("x", validation__preservation=0.9, control__random__preservation=0.1, circuit__nodes=8),
    1: finished("y", validation__preservation=0.8, control__random__preservation=0.1, circuit__nodes=8),
}


def test_rows_of_a_table_with_a_cell_that_is_not_done() -> None:
    tiny = table(published=[{**SPEC["published"][0], "row": {"search.pruning": "true", "task": "sorting"}}])
    seen = view(tiny, with_runs(tiny, DONE, {}))
    first, second, absent = seen.rows
    assert first.labels == ("with", "sorting") and first.seeds == (0, 1) and first.asked == 3
    assert first.measured[0] is not None and first.measured[0].mean == pytest.approx(0.85)
    assert first.measured[1] == Measured(8, 0, 2, (8, 8))
    assert first.folders == ("x", "y")
    assert second.measured == (None, None) and second.seeds == () and second.needs is None
    assert absent.labels == ("with", "ioi") and absent.needs == "70_B parameters" and absent.measured == (None, None)


def test_published_figures_change_no_figure_of_ours() -> None:
    row = {"search.pruning": "true", "task": "sorting"}
    tiny, bare = table(published=[{**SPEC["published"][0], "row": row}, SPEC["published"][1]]), table(published=[])
    seen, without = (view(each, with_runs(each, DONE, DONE)) for each in (tiny, bare))
    assert [row.measured for row in seen.rows[:3]] == [row.measured for row in without.rows]
    assert seen.rows[0].quoted == (Quoted("φ", "0.97", 1), Quoted("nodes", "47", 1))
    assert [row.quoted for row in seen.rows[1:]] == [(), (), (Quoted("φ", "0.74–0.88", 2),)]
    assert seen.rows[3].labels == ("language_tasks", "") and seen.rows[3].measured == (None, None)
    assert seen.sources == ("GPT-2 Small: Table II", "language_tasks: abstract")
    assert all(row.quoted == () for row in without.rows) and without.sources == ()


def test_a_row_that_cannot_run_stays_empty_whatever_there_is() -> None:
    tiny = table(not_run=[{"row": {"search.pruning": "true", "task": "sorting"}, "needs": "n"}], published=[])
    seen = view(tiny, with_runs(tiny, DONE, DONE))
    assert seen.rows[-1].measured == (None, None) and seen.rows[-1].seeds is None


def test_an_axis_with_one_value_is_named_once() -> None:
    tiny = table(not_run=[], published=[])
    seen = view(tiny, with_runs(tiny, DONE, DONE))
    assert seen.axes == ("pruning",) and seen.fixed == {"task": "sorting"}
    assert [row.labels for row in seen.rows] == [("with",), ("without",)]


def test_parts_of_a_cell_are_rows_of_it() -> None:
    column = {"metric": "{part}.value", "label": "v", "controls": {"r": "{part}.control"}}
    parts = {"label": "part", "values": {"first": "one", "second": "two"}}
    published = [
        {"figures": {"v": "3"}, "of": "o", "source": "s"},
        {"row": {"search.pruning": "false", "task": "sorting"}, "figures": {"v": "4"}, "of": "o", "source": "s"},
    ]
    tiny = table(columns={"v": column}, parts=parts, published=published)
    runs = {i: finished("x", first__value=2.0, first__control=1.0, second__value=v) for i, v in enumerate((4.0, 6.0))}
    seen = view(tiny, with_runs(tiny, runs, {}))
    assert seen.axes == ("pruning", "task", "part")
    labels = [("with", "sorting", "one"), ("with", "sorting", "two"), ("without", "sorting", "one")]
    assert [row.labels for row in seen.rows[:3]] == labels
    assert seen.rows[0].measured == (Measured(2.0, 0.0, 2, (2.0, 2.0)),)
    second = seen.rows[1].measured[0]
    assert second is not None and second.mean == 5 and second.marks == ("r",), "its own control is not there"
    assert seen.rows[2].measured == (None,)
    assert [[each.text for each in row.quoted] for row in seen.rows[:4]] == [[], [], ["4"], []]
    assert seen.rows[4].labels == ("with", "ioi", "") and seen.rows[5].labels == ("o", "", "")
    assert "| with | sorting | two | 2 of 3 | 5.00" in markdown(seen)


def test_a_published_figure_belongs_to_one_row() -> None:
    tiny = table()  # its first published figure names the pruning alone, which two rows have
    with pytest.raises(ConfigError, match="belong to one row, found 2 rows"):
        view(tiny, with_runs(tiny, DONE, DONE))


def test_exponents_are_those_of_all_finished_runs() -> None:
    fit = {"column": "preservation", "x": "circuit.nodes", "label": "nodes"}
    tiny = table(fits=[fit], published=[])
    runs = [{i: finished("x", circuit__nodes=n, validation__preservation=n**3)} for i, n in enumerate((2.0, 4.0))]
    (found,) = view(tiny, with_runs(tiny, *runs)).fits
    assert found[:2] == ("φ", "nodes") and found[2] is not None and found[2].value == pytest.approx(3)
    assert "φ grows with the power 3.00 of nodes (n = 2)" in markdown(view(tiny, with_runs(tiny, *runs)))
    assert "φ over nodes: not enough runs" in markdown(view(tiny, with_runs(tiny, {}, {})))
