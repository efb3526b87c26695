"""Faithfulness curves as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from html import escape

import numpy as np

from hagd.report.plotting import spread
from hagd.report.records import Curve, ReportData
from hagd.report.wording import number

WIDTH, HEIGHT = 640, 330
LEFT, RIGHT, TOP, BOTTOM = 40, 470, 14, 284
N_COLOURS = 6
MAX_PARTS = 10
"""Most parts between the lowest and the highest value that grid lines divide."""
OVERSHOOT = 0.03
"""Values this little outside [0, 1] get no tick of their own."""


class Axes:
    """Maps sizes (log) and values (linear) to SVG coordinates."""

    def __init__(self, sizes: Sequence[float], values: Sequence[float]) -> None:
        self.sizes = sorted(set(sizes))
        self._low, self._high = math.log(self.sizes[0]), math.log(self.sizes[-1])
        lowest, highest = min(0.0, min(values) + OVERSHOOT), max(1.0, max(values) - OVERSHOOT)
        self.step = _step(highest - lowest)
        self.floor = math.floor(lowest / self.step) * self.step
        self.ceiling = math.ceil(highest / self.step) * self.step

    def x(self, size: float) -> float:
        """Horizontal place of a size."""
        span = self._high - self._low
        return (
            (LEFT + RIGHT) / 2 if span == 0 else LEFT + 14 + (RIGHT - LEFT - 28) * (math.log(size) - self._low) / span
        )

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        return BOTTOM - (BOTTOM - TOP) * (value - self.floor) / (self.ceiling - self.floor)

    def points(self, sizes: Sequence[float], values: Sequence[float]) -> list[str]:
        """SVG points of a line; values that are not finite are left out."""
        pairs = zip(sizes, values, strict=True)
        return [f"{self.x(size):.1f},{self.y(value):.1f}" for size, value in pairs if math.isfinite(value)]


def _step(span: float) -> float:
    """The smallest of 0.2, 0.5, 1, 2, 5, 10, … of which at most `MAX_PARTS` make up `span`."""
    steps = (digit * 10.0**power for power in itertools.count(-1) for digit in (2, 5, 10))
    return next(step for step in steps if span <= MAX_PARTS * step)


def curve_charts(data: ReportData) -> str:
    """Two charts, preservation with intervals and faithfulness, or a sentence when no curve was measured."""
    if not data.curves:
        return "<p>No curve was measured in this run.</p>"
    accuracy = data.metrics["model.accuracy"]
    empty = data.metrics["empty.accuracy"] / accuracy if accuracy else 0.0
    preservation = _chart(data.curves, "preservation", "Behavioural preservation", empty)
    faithfulness = _chart(data.curves, "faithfulness", "Faithfulness", 0.0)
    return f'<div class="charts">{preservation}{faithfulness}</div>'


def _chart(curves: Sequence[Curve], attribute: str, title: str, floor: float) -> str:
    banded = attribute == "preservation"
    values = [floor, *(value for curve in curves for value in getattr(curve, attribute))]
    values += [bound for curve in curves if banded for bound in (*curve.low, *curve.high)]
    finite = [value for value in values if math.isfinite(value)]
    axes = Axes([size for curve in curves for size in curve.sizes], finite)
    colours = _colours(curves)
    parts = [_scales(axes), _floor(axes, floor)]
    for curve, colour in zip(curves, colours, strict=True):
        if banded and curve.low:
            parts.append(_band(axes, curve, colour))
    parts += [_line(axes, curve, attribute, colour) for curve, colour in zip(curves, colours, strict=True)]
    parts.append(_names(axes, curves, attribute, colours, floor))
    label = escape(f"{title} by circuit size; the values are in the table of curves")
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _colours(curves: Sequence[Curve]) -> list[str]:
    controls = iter(range(len(curves)))
    return [f"var(--series-{1 + next(controls) % (N_COLOURS - 1) if curve.control else 0})" for curve in curves]


def _scales(axes: Axes) -> str:
    parts, decimals = [], 1 if axes.step < 1 else 0
    for tick in np.arange(axes.floor, axes.ceiling + axes.step / 2, axes.step):
        y = axes.y(float(tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{tick + 0.0:.{decimals}f}</text>')
    last = -math.inf
    for size in axes.sizes:
        x = axes.x(size)
        if x - last >= 32:
            parts.append(f'<text x="{x:.1f}" y="{BOTTOM + 18}" text-anchor="middle">{number(size)}</text>')
            last = x
    middle = (LEFT + RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">nodes kept (log scale)</text>')
    return "".join(parts)


def _floor(axes: Axes, value: float) -> str:
    y = axes.y(value)
    return f'<line class="floor" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'


def _band(axes: Axes, curve: Curve, colour: str) -> str:
    outline = axes.points(curve.sizes, curve.low) + axes.points(curve.sizes, curve.high)[::-1]
    return f'<polygon points="{" ".join(outline)}" fill="{colour}" opacity="0.18"/>'


def _line(axes: Axes, curve: Curve, attribute: str, colour: str) -> str:
    values = getattr(curve, attribute)
    points = axes.points(curve.sizes, values)
    width = 1.8 if curve.control else 3
    parts = [f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}" stroke-width="{width}"/>']
    for size, value in zip(curve.sizes, values, strict=True):
        if math.isfinite(value):
            tip = escape(f"{curve.method}, {number(size)} nodes: {value:.3f}")
            place = f'cx="{axes.x(size):.1f}" cy="{axes.y(value):.1f}"'
            parts.append(f'<circle {place} r="{width + 1.6:.1f}" fill="{colour}"><title>{tip}</title></circle>')
    return "".join(parts)


def _names(axes: Axes, curves: Sequence[Curve], attribute: str, colours: list[str], floor: float) -> str:
    ends = [(floor, "empty circuit", "var(--muted)", RIGHT - 2.0)]
    for curve, colour in zip(curves, colours, strict=True):
        value = getattr(curve, attribute)[-1]
        if math.isfinite(value):
            ends.append((value, curve.method, colour, axes.x(curve.sizes[-1]) + 5))
    heights = np.array([axes.y(value) for value, *_ in ends])
    parts = []
    for place, (value, name, colour, x) in zip(spread(heights, 16.0), ends, strict=True):
        line = f"M{x:.1f} {axes.y(value):.1f} L{RIGHT + 10} {place:.1f}"
        parts.append(f'<path d="{line}" stroke="{colour}" fill="none" opacity="0.6"/>')
        parts.append(
            f'<text class="name" x="{RIGHT + 14}" y="{place + 4:.1f}" style="fill:{colour}">{escape(name)}</text>'
        )
    return "".join(parts)
