from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text

from hagd.report.circuit_figure import circuit_figure, grid_layout
from hagd.report.figures import faithfulness_figure, write_figures
from hagd.report.plotting import drawable, spread
from hagd.report.records import ReportData

PNG = b"\x89PNG\r\n\x1a\n"


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header.startswith(PNG)
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


def test_all_figures_are_drawn_without_warnings(report: ReportData, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        paths = write_figures(report, tmp_path / "figures")
    assert [path.name for path in paths] == ["faithfulness.png", "circuit.png", "reconstruction.png"]
    assert all(width > 600 and height > 400 for width, height in map(png_size, paths))


def test_the_circuit_figure_states_the_size_of_the_circuit(report: ReportData) -> None:
    assert len(report.nodes) == 200, "with errors, tokens and logits"
    assert "Circuit of 192 nodes · " in next(text.get_text() for text in circuit_figure(report).texts)


def labelled(report: ReportData, names: list[str]) -> ReportData:
    """The same report with other names of the supernodes that give the colours."""
    levels = list(report.levels)
    depth = report.coarsest()
    assert depth is not None
    views = zip(levels[depth].supernodes, names, strict=True)
    levels[depth] = replace(levels[depth], supernodes=tuple(replace(view, label=name) for view, name in views))
    return replace(report, levels=tuple(levels))


def test_the_key_of_the_circuit_figure_has_whole_labels(report: ReportData) -> None:
    """On as many lines as they need, apart from each other, from the edge and from what is above."""
    names = [f"subject L{i}–12: Washington Amsterdam → Netherlands ({i}, heads: 7)" for i in range(4)]
    figure = circuit_figure(labelled(report, names))
    shown = [text for text in figure.texts if not text.get_text().startswith("Circuit of")]
    assert [text.get_text() for text in shown if text.get_text() in names] == names
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [text.get_window_extent(renderer) for text in shown]
    for i, box in enumerate(boxes):
        assert box.x1 < figure.bbox.x1 and box.y0 > 0 and box.y1 < figure.axes[0].bbox.y0
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_a_label_wider_than_the_figure_is_cut(report: ReportData) -> None:
    figure = circuit_figure(labelled(report, ["w" * 200, "b", "c", "d"]))
    (cut,) = [text for text in figure.texts if text.get_text().startswith("www")]
    assert cut.get_text().endswith("w…")
    right = cut.get_window_extent(figure.canvas.get_renderer()).x1  # type: ignore[attr-defined]
    assert 0.95 * figure.bbox.x1 < right < figure.bbox.x1


def test_figures_without_data_are_left_out(report: ReportData, tmp_path: Path) -> None:
    paths = write_figures(replace(report, curves=(), reconstruction=()), tmp_path)
    assert [path.name for path in paths] == ["circuit.png"]


def test_tall_circuits_stay_printable(make_report: Callable[..., ReportData], tmp_path: Path) -> None:
    data = replace(make_report(800, 1000, n_layers=30), curves=(), reconstruction=())
    (path,) = write_figures(data, tmp_path)
    assert png_size(path)[1] < 6500


def test_nodes_lie_in_their_cells_and_apart(report: ReportData) -> None:
    grid = grid_layout(report)
    slots = np.array([node.slot for node in report.nodes])
    assert (np.floor(grid.positions[:, 0] / grid.column) == slots).all()
    rows = np.searchsorted(grid.bottoms, grid.positions[:, 1]) - 1
    wanted = [{"token": 0, "logit": len(grid.rows) - 1}.get(node.kind, node.layer + 1) for node in report.nodes]
    assert rows.tolist() == wanted
    gaps = np.linalg.norm(grid.positions[:, None] - grid.positions[None], axis=2) + 9 * np.eye(len(slots))
    assert (gaps.min(axis=1) >= grid.room - 1e-9).all()


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12), st.floats(0.1, 20))
def test_spread_keeps_order_mean_and_gap(positions: list[float], gap: float) -> None:
    before = np.array(positions)
    after = spread(before, gap)
    order = np.argsort(before, kind="stable")
    assert (np.diff(after[order]) >= gap - 1e-6).all()
    assert after.mean() == pytest.approx(before.mean(), abs=1e-6)


def test_labels_that_do_not_touch_stay_where_they_are() -> None:
    assert spread(np.array([5.0, 1.0, 9.0]), 2.0).tolist() == [5.0, 1.0, 9.0]


def test_lines_to_names_do_not_cross_them(report: ReportData) -> None:
    curves = tuple(replace(c, preservation=(*c.preservation[:-1], 1.0), low=(), high=()) for c in report.curves)
    figure = faithfulness_figure(replace(report, curves=curves))
    figure.canvas.draw()
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    named = [text for text in figure.axes[0].texts if text.arrow_patch is not None]  # type: ignore[attr-defined]
    assert len(named) == len(curves) + 1
    for text in named:
        line = text.arrow_patch.get_path().get_extents(text.arrow_patch.get_transform())
        assert line.x1 < Text.get_window_extent(text, renderer).x0
    tops = [Text.get_window_extent(text, renderer).y1 for text in named[: len(curves)]]
    assert tops == sorted(tops, reverse=True), "of those that end together the first on top"


def test_glyphs_that_the_font_lacks_are_replaced() -> None:
    assert drawable("日a") == "□a"
    assert drawable(" Paris") == "␣Paris"
    assert drawable("abcdefghijklmnopq", 5) == "abcd…"
