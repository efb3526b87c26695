"""Figures of one extraction as PNG files (matplotlib, Agg)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hagd.report.circuit_figure import circuit_figure
from hagd.report.plotting import GREY, INK, PALETTE, STYLE, drawable, label_line_ends
from hagd.report.records import Curve, ReportData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 150

TICK_RATIO = 1.45
"""Sizes closer than this factor to the tick before get none, so that labels do not touch."""


def write_figures(data: ReportData, folder: Path) -> tuple[Path, ...]:
    """Draw `faithfulness.png`, `circuit.png` and `reconstruction.png` into `folder`.

    A figure whose data are empty (no curves, no nodes, no decomposed layer) is left out.

    Returns:
        The files written.
    """
    drawings = (
        ("faithfulness.png", faithfulness_figure, data.curves),
        ("circuit.png", circuit_figure, data.nodes),
        ("reconstruction.png", reconstruction_figure, data.reconstruction),
    )
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, draw, needed in drawings:
        if needed:
            with _styled():
                draw(data).savefig(folder / name, dpi=DPI, facecolor="white", pil_kwargs={"compress_level": 1})
            written.append(folder / name)
    return tuple(written)


@contextmanager
def _styled() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        yield


def _figure(width: float, height: float, columns: int) -> tuple[Figure, Sequence[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns, squeeze=False)[0]


def faithfulness_figure(data: ReportData) -> Figure:
    """Preservation (with 95 % intervals) and faithfulness against circuit size."""
    figure, (left, right) = _figure(11, 4.6, 2)
    figure.subplots_adjust(left=0.055, right=0.835, top=0.84, bottom=0.13, wspace=0.68)
    for curve, colour in zip(data.curves, _curve_colours(data.curves), strict=True):
        style: dict[str, Any] = {
            "color": colour,
            "linewidth": 1.6 if curve.control else 2.6,
            "marker": "o",
            "markersize": 3.5,
        }
        left.plot(curve.sizes, curve.preservation, **style)
        right.plot(curve.sizes, curve.faithfulness, **style)
        if curve.low:
            left.fill_between(curve.sizes, curve.low, curve.high, color=colour, alpha=0.18, linewidth=0)
    _mark_extracted(left, data)
    accuracy = data.metrics["model.accuracy"]
    empty = data.metrics["empty.accuracy"] / accuracy if accuracy else 0.0
    ends = [(curve.method, colour) for curve, colour in zip(data.curves, _curve_colours(data.curves), strict=True)]
    for axes, attribute, floor, title in (
        (left, "preservation", empty, "Behavioural preservation"),
        (right, "faithfulness", 0.0, "Faithfulness"),
    ):
        axes.axhline(floor, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.set_xscale("log")
        axes.set_title(title)
        axes.set_xlabel("nodes kept (log scale)")
        heights = [getattr(curve, attribute)[-1] for curve in data.curves]
        labels = [*zip(heights, ends, strict=True), (floor, ("empty circuit", GREY))]
        _size_ticks(axes, data.curves)
        label_line_ends(axes, [(height, name, colour) for height, (name, colour) in labels])
    figure.suptitle(f"{data.model} · {data.task}, held-out prompts", x=0.055, ha="left", y=0.97)
    return figure


def _curve_colours(curves: Sequence[Curve]) -> list[str]:
    controls = iter(PALETTE[1:] * len(curves))
    return [next(controls) if curve.control else PALETTE[0] for curve in curves]


def _size_ticks(axes: Axes, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    ticks: list[int] = []
    for size in sorted({size for curve in curves for size in curve.sizes}):
        if not ticks or size / ticks[-1] > TICK_RATIO:
            ticks.append(size)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size / 1000:g}k" if size >= 1000 else f"{size:g}"))


def _mark_extracted(axes: Axes, data: ReportData) -> None:
    value, interval = data.metrics["validation.preservation"], data.interval("validation.preservation")
    size = data.metrics["circuit.nodes"]
    if interval is not None:
        axes.vlines(size, *interval, color=INK, linewidth=1.4, zorder=4)
    axes.plot([size], [value], "o", markersize=8, markerfacecolor="white", markeredgecolor=INK, zorder=5)
    axes.annotate(
        "this circuit", (size, value), (-9, 5), textcoords="offset points", ha="right", va="bottom", color=INK
    )


def reconstruction_figure(data: ReportData) -> Figure:
    """Unexplained share of variance by layer: all slots together (bold) and each slot."""
    from matplotlib.ticker import MaxNLocator

    figure, (axes,) = _figure(max(6.4, 3.6 + 0.28 * len(data.reconstruction)), 4.2, 1)
    figure.subplots_adjust(left=0.11, right=0.84, top=0.86, bottom=0.14)
    layers = [record.layer for record in data.reconstruction]
    ends = []
    for slot, name in enumerate(data.slot_names):
        values = [record.slot_fvu[slot] if slot < len(record.slot_fvu) else np.nan for record in data.reconstruction]
        if not np.isnan(values).all():
            colour = PALETTE[1 + slot % (len(PALETTE) - 1)]
            axes.plot(layers, values, color=colour, linewidth=1.4, marker="o", markersize=4)
            ends.append((values[-1], f"at {drawable(name)}", colour))
    overall = [record.fvu for record in data.reconstruction]
    axes.plot(layers, overall, color=INK, linewidth=2.6, marker="o", markersize=5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set_ylim(bottom=0)
    axes.margins(x=0.08)
    axes.set_xlabel("layer")
    axes.set_title("Unexplained variance of the transcoders")
    label_line_ends(axes, [*ends, (overall[-1], "all slots", INK)])
    return figure
