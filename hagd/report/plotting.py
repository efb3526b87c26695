"""Look of the figures: palette (Okabe–Ito, safe for colour-blind readers), type, labels at line ends."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from hagd.report.wording import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

INK = "#1f2933"
GREY = "#7b8794"
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31")
POSITIVE, NEGATIVE = "#0072B2", "#D55E00"

STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # tokens may hold dollar signs
    "font.size": 9.5,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.titlesize": 10,
}


def spread(positions: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Move positions apart until neighbours are `gap` apart, keeping their order and each group's mean."""
    order = np.argsort(positions, kind="stable")
    groups = [[position, 1] for position in positions[order]]
    index = 0
    while index < len(groups) - 1:
        (centre, count), (above, more) = groups[index], groups[index + 1]
        if above - centre >= gap * (count + more) / 2:
            index += 1
            continue
        groups[index : index + 2] = [[(centre * count + above * more) / (count + more), count + more]]
        index = max(0, index - 1)
    moved = np.empty_like(positions)
    moved[order] = np.concatenate([centre + gap * (np.arange(count) - (count - 1) / 2) for centre, count in groups])
    return moved


def label_line_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line, given as (last value, name, colour), at the right edge of the axes, in its colour; of lines that
    end together the first on top."""
    ends = [end for end in ends if np.isfinite(end[0])]
    figure = axes.figure
    pixels = axes.transData.transform([(axes.get_xlim()[1], value) for value, _, _ in ends])[:, 1]
    row = 1.35 * STYLE["font.size"] / 72 * figure.dpi
    for height, (value, name, colour) in zip(-spread(-pixels, row), ends, strict=True):
        fraction = axes.transAxes.inverted().transform((0, height))[1]
        axes.annotate(
            name,
            (1.0, value),
            (1.045, fraction),
            xycoords=axes.get_yaxis_transform(),
            textcoords="axes fraction",
            color=colour,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "linewidth": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )


@lru_cache(maxsize=1)
def _characters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties(family=STYLE["font.family"]))).get_charmap())


def drawable(text: str, limit: int = 14) -> str:
    """Text with visible white space, at most `limit` characters, without glyphs that the font lacks."""
    shown = "".join(character if ord(character) in _characters() else "□" for character in visible(text))
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"
