"""The circuit drawn by layer (rows) and slot (columns)."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from hagd.report.plotting import GREY, INK, NEGATIVE, POSITIVE, drawable
from hagd.report.records import NodeView, ReportData
from hagd.report.wording import node_label, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

MAX_EDGES = 300
MAX_COLUMN, MAX_WIDTH, MAX_HEIGHT, LEFT, RIGHT, ROW_GAP = 3.0, 14.0, 24.0, 0.9, 0.2, 0.26  # inches
KEY_BOTTOM, KEY_LINE, KEY_TOP, KEY_GAP = 0.22, 0.26, 0.27, 0.08  # inches
KEY_SIZE = 8.5  # points
SUPERNODE_COLOURS = ("#44AA99", "#CC6677", "#DDCC77", "#AA4499", "#88CCEE", "#999933", "#117733", "#882255")
PLAIN = "#cbd2d9"
MARKERS = {"feature": "o", "head": "^", "error": "D", "token": "s", "logit": "s"}


@dataclass(frozen=True)
class Grid:
    """Where everything lies, in inches.

    Attributes:
        rows: names, bottom to top.
        bottoms: of each row, and above the last one the total height.
        column: width of a column.
        positions: of each node, `[N, 2]`.
        room: largest diameter of each node that touches no neighbour, `[N]`.
    """

    rows: tuple[str, ...]
    bottoms: NDArray[np.float64]
    column: float
    positions: NDArray[np.float64]
    room: NDArray[np.float64]


def grid_layout(data: ReportData) -> Grid:
    """Place nodes in cells (row = tokens, layers, logits; column = slot), the most important first.

    A row is as high as its fullest cell needs.
    """
    layers = sorted({node.layer for node in data.nodes if node.kind not in ("token", "logit")})
    keys = [("token", 0), *(("layer", layer) for layer in layers), ("logit", 0)]
    row_of = {key: row for row, key in enumerate(keys)}
    cells: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index in sorted(range(len(data.nodes)), key=lambda i: (_group(data, data.nodes[i]), -data.nodes[i].score)):
        cells[row_of[_row_key(data.nodes[index])], data.nodes[index].slot].append(index)
    column = min(MAX_COLUMN, MAX_WIDTH / len(data.slot_names))
    heights = _row_heights([key[0] == "layer" for key in keys], cells)
    bottoms = np.concatenate([[0.0], np.cumsum(heights + ROW_GAP)])
    positions, room = np.zeros((len(data.nodes), 2)), np.zeros(len(data.nodes))
    for (row, slot), members in cells.items():
        width, height = 0.86 * column, heights[row]
        columns = max(1, min(len(members), math.ceil(math.sqrt(len(members) * width / height))))
        lines = math.ceil(len(members) / columns)
        place = np.arange(len(members))
        positions[members, 0] = (slot + 0.07) * column + width * (place % columns + 0.5) / columns
        positions[members, 1] = bottoms[row] + height * (1 - (place // columns + 0.5) / lines)
        room[members] = min(width / columns, height / lines)
    names = ("tokens", *(f"layer {layer}" for layer in layers), "logits")
    return Grid(names, bottoms, column, positions, room)


def _row_heights(is_layer: list[bool], cells: dict[tuple[int, int], list[int]]) -> NDArray[np.float64]:
    """Heights in inches, squeezed if the figure would become too tall."""
    fullest = np.zeros(len(is_layer))
    for (row, _), members in cells.items():
        fullest[row] = max(fullest[row], len(members))
    heights = np.where(is_layer, 0.55 + 0.12 * np.sqrt(fullest), 0.45)
    return heights * min(1.0, MAX_HEIGHT / float(heights.sum()))


def _row_key(node: NodeView) -> tuple[str, int]:
    return (node.kind, 0) if node.kind in ("token", "logit") else ("layer", node.layer)


def _group(data: ReportData, node: NodeView) -> int:
    """Index of the coarsest supernode that says something; -1 outside the hierarchy."""
    level = data.coarsest()
    return -1 if level is None or not node.supernodes else node.supernodes[level]


def circuit_figure(data: ReportData) -> Figure:
    """Nodes in their cells, sized by score and coloured by coarsest supernode; the strongest edges by sign."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = grid_layout(data)
    across, up = grid.column * len(data.slot_names), float(grid.bottoms[-1])
    width = max(7.0, across + LEFT + RIGHT)
    figure = Figure(figsize=(width, up))
    FigureCanvasAgg(figure)
    key = _key(figure, data)
    below = KEY_BOTTOM + KEY_LINE * (len(key) - 1) + KEY_TOP
    height = below + up + 0.55
    figure.set_size_inches(width, height)
    axes = figure.add_axes((LEFT / width, below / height, across / width, up / height))
    axes.set_xlim(0, across)
    axes.set_ylim(0, up)
    axes.axis("off")
    _draw_cells(axes, data, grid)
    _draw_edges(axes, data, grid)
    _draw_nodes(axes, data, grid)
    title = f"Circuit of {number(data.metrics['circuit.nodes'])} nodes · {data.model} · {data.task}"
    figure.text(LEFT / width, 1 - 0.25 / height, title, weight="bold", size=11, va="center")
    for number_below, line in zip(reversed(range(len(key))), key, strict=True):
        for left, text, colour in line:
            place = left / width, (KEY_BOTTOM + KEY_LINE * number_below) / height
            figure.text(*place, text, color=colour, size=KEY_SIZE, va="center")
    return figure


def _draw_cells(axes: Axes, data: ReportData, grid: Grid) -> None:
    from matplotlib.patches import Rectangle

    for row, name in enumerate(grid.rows):
        bottom, height = grid.bottoms[row], grid.bottoms[row + 1] - grid.bottoms[row] - ROW_GAP
        for slot in range(len(data.slot_names)):
            corner = ((slot + 0.03) * grid.column, bottom - 0.05)
            cell = Rectangle(corner, 0.94 * grid.column, height + 0.1, facecolor="#f5f7fa", zorder=0)
            axes.add_patch(cell)
        axes.annotate(
            name, (0, bottom + height / 2), (-8, 0), textcoords="offset points", ha="right", va="center", size=9
        )
    for slot, name in enumerate(data.slot_names):
        axes.annotate(
            drawable(name, 22),
            ((slot + 0.5) * grid.column, grid.bottoms[-1] - ROW_GAP),
            (0, 9),
            textcoords="offset points",
            ha="center",
            va="bottom",
            weight="bold",
            size=10,
        )


def _draw_edges(axes: Axes, data: ReportData, grid: Grid) -> None:
    """Draw the strongest edges as curves that leave upwards and arrive from below."""
    from matplotlib.collections import LineCollection

    strongest = np.argsort(-np.abs(data.edges.weight), kind="stable")[:MAX_EDGES][::-1]
    if strongest.size == 0:
        return
    place = {node.id: index for index, node in enumerate(data.nodes)}
    start = grid.positions[[place[i] for i in data.edges.source[strongest].tolist()]]
    end = grid.positions[[place[i] for i in data.edges.target[strongest].tolist()]]
    weight = data.edges.weight[strongest]
    strength = np.sqrt(np.abs(weight) / max(float(np.abs(weight).max()), 1e-12))
    t = np.linspace(0, 1, 24)[None, :]
    ease = 3 * t**2 - 2 * t**3
    x = start[:, :1] + (end - start)[:, :1] * ease
    y = start[:, 1:] + (end - start)[:, 1:] * t
    colours = np.where(weight > 0, POSITIVE, NEGATIVE).tolist()
    curves = LineCollection(
        list(np.stack([x, y], axis=2)),
        colors=colours,
        linewidths=0.3 + 2.2 * strength**2,
        alpha=(0.12 + 0.5 * strength).tolist(),
        zorder=1,
    )
    axes.add_collection(curves)


def _draw_nodes(axes: Axes, data: ReportData, grid: Grid) -> None:
    scores = np.array([max(node.score, 0.0) for node in data.nodes])
    relative = np.sqrt(scores / max(float(scores.max()), 1e-12))
    sizes = np.minimum(0.95 * 72 * grid.room, 26) * (0.3 + 0.7 * relative)  # points
    for kind, marker in MARKERS.items():
        members = [index for index, node in enumerate(data.nodes) if node.kind == kind]
        if kind in ("token", "logit"):
            for index in members:
                _draw_name(axes, data.nodes[index], grid.positions[index])
        elif members:
            x, y = grid.positions[members].T
            fill = ["white" if kind == "error" else _colour(_group(data, data.nodes[index])) for index in members]
            edge = INK if kind == "error" else "white"
            areas = sizes[members] ** 2
            axes.scatter(x, y, s=areas, c=fill, marker=marker, edgecolors=edge, linewidths=0.7, zorder=3)


def _draw_name(axes: Axes, node: NodeView, position: NDArray[np.float64]) -> None:
    box = {"boxstyle": "round,pad=0.3", "facecolor": "white", "edgecolor": GREY, "linewidth": 0.8}
    text = drawable(node_label(node))
    axes.text(position[0], position[1], text, ha="center", va="center", size=8, bbox=box, zorder=4)


def _colour(group: int) -> str:
    return PLAIN if group < 0 else SUPERNODE_COLOURS[group % len(SUPERNODE_COLOURS)]


def _key(figure: Figure, data: ReportData) -> list[list[tuple[float, str, str]]]:
    """Lines, top to bottom, of pieces of text (inches from the left, text, colour) that explain the signs of edges and
    then the colours of supernodes."""
    n_edges = data.edges.weight.size
    lines = _flow(
        figure,
        [
            [(f"strongest {min(n_edges, MAX_EDGES):,} of {n_edges:,} edges:", INK)],
            [("positive", POSITIVE)],
            [("negative", NEGATIVE)],
        ],
    )
    level = data.coarsest()
    labels = () if level is None else data.levels[level].labels
    if 0 < len(labels) <= len(SUPERNODE_COLOURS):
        room = figure.get_figwidth() - LEFT - RIGHT - _width(figure, "●") - KEY_GAP
        named = [_fitting(figure, drawable(label, len(label)), room) for label in labels]
        supernodes = [[("●", colour), (name, INK)] for colour, name in zip(SUPERNODE_COLOURS, named, strict=False)]
        lines += _flow(figure, [[("supernodes:", INK)], *supernodes])
    return lines


def _flow(figure: Figure, groups: list[list[tuple[str, str]]]) -> list[list[tuple[float, str, str]]]:
    """Groups of coloured text, each on one line, on as many lines as they need."""
    lines: list[list[tuple[float, str, str]]] = [[]]
    left = LEFT
    for group in groups:
        widths = [_width(figure, text) for text, _ in group]
        if left + sum(widths) + KEY_GAP * (len(group) - 1) > figure.get_figwidth() - RIGHT + 1e-6 and lines[-1]:
            lines.append([])
            left = LEFT
        for (text, colour), width in zip(group, widths, strict=True):
            lines[-1].append((left, text, colour))
            left += width + KEY_GAP
        left += KEY_GAP
    return lines


def _fitting(figure: Figure, text: str, room: float) -> str:
    """Text that is at most `room` inches wide, cut where it must be."""
    shown, end = text, len(text)
    while end > 1 and _width(figure, shown) > room:
        end -= 1
        shown = f"{text[:end]}…"
    return shown


def _width(figure: Figure, text: str) -> float:
    """Width of text of the key in inches."""
    piece = figure.text(0, 0, text, size=KEY_SIZE)
    extent = piece.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    piece.remove()
    return extent.width / figure.dpi
