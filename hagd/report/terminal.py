"""The results of one extraction in the terminal."""

from __future__ import annotations

import math

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hagd.report.records import ReportData
from hagd.report.wording import (
    bounds,
    comparisons,
    control_line,
    does_task,
    headline,
    number,
    percent,
    verdict,
    warnings,
)

STANDING_STYLE = {"above": "green", "overlaps": "yellow", "below": "red"}

MAX_SLOT_COLUMNS = 6
"""More slots than this do not fit a terminal; the page shows them all."""


def print_summary(data: ReportData, console: Console) -> None:
    """Print the headline, its verdict against the controls, and compact tables of every stage."""
    standing, sentence = verdict(data)
    console.print()
    console.print(Text(f"{data.model} · {data.task} · seed {data.seed}", style="dim"))
    console.print(Text(headline(data) + ".", style="bold"))
    if does_task(data):
        console.print(Text(control_line(data)))
    console.print(Text(sentence, style=STANDING_STYLE[standing]))
    for warning in warnings(data):
        console.print(Text(f"Warning: {warning}", style="yellow"))
    parts = (_controls, _validation, _parts_removed, _shift, _curves, _search, _reconstruction, _hierarchy)
    for table in (part(data) for part in parts):
        if table.row_count:
            console.print(Padding(table, (1, 0, 0, 0)))
    console.print()


def plain_table(title: str, *columns: str) -> Table:
    """A table without frame; the first column is set flush left, the others flush right."""
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.show_edge = False
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if index == 0 else "right")
    return table


def _controls(data: ReportData) -> Table:
    table = plain_table("Preservation", "circuit", "φ", "95 %", "ours is")
    own = data.metrics["validation.preservation"]
    table.add_row(
        Text("this circuit", style="bold"), percent(own), bounds(data.interval("validation.preservation")), ""
    )
    for item in comparisons(data):
        standing = Text(item.standing, style=STANDING_STYLE[item.standing])
        table.add_row(item.control, percent(item.preservation), bounds(item.interval), standing)
    return table


def _validation(data: ReportData) -> Table:
    unseen = "resample" if "validation.preservation_resample" in data.metrics else "mean"
    table = plain_table(
        "Causal checks on held-out prompts", "sufficiency", "necessity", "φ lenient", f"φ {unseen}", "CPR log", "CMD"
    )
    keys = ("validation.sufficiency", "validation.necessity")
    shares = ("validation.preservation_lenient", f"validation.preservation_{unseen}")
    table.columns[0].justify = "right"
    table.add_row(
        *(number(data.metrics.get(key)) for key in keys),
        *(percent(data.metrics.get(key)) for key in shares),
        *(number(data.metrics.get(key)) for key in ("curve.cpr_log", "curve.cmd")),
    )
    return table


def _parts_removed(data: ReportData) -> Table:
    table = plain_table(
        "Parts of the circuit removed",
        "minimality",
        "node effect",
        "outside",
        "incompleteness",
        "random nodes",
    )
    keys = ("validation.minimality", "validation.node_effect", "control.outsiders.node_effect")
    table.columns[0].justify = "right"
    if not {"validation.minimality", "validation.incompleteness"} & set(data.metrics):
        return table
    table.add_row(
        percent(data.metrics.get(keys[0])),
        *(number(data.metrics.get(key), 2) for key in keys[1:]),
        *(number(data.metrics.get(f"{of}.incompleteness"), 2) for of in ("validation", "control.random")),
    )
    return table


def _shift(data: ReportData) -> Table:
    table = plain_table("Prompts of other wordings", "prompts", "model", "empty", "φ", "95 %", "random φ", "IG φ")
    table.columns[0].justify = "right"
    if "shift.preservation" in data.metrics:
        table.add_row(
            number(data.metrics["shift.n_prompts"]),
            *(percent(data.metrics[f"shift.{of}_accuracy"]) for of in ("model", "empty")),
            percent(data.metrics["shift.preservation"]),
            bounds(data.interval("shift.preservation")),
            *(percent(data.metrics[f"shift.{of}.preservation"]) for of in ("random", "attribution")),
        )
    return table


def _curves(data: ReportData) -> Table:
    sizes = sorted({size for curve in data.curves for size in curve.sizes})
    table = plain_table("Preservation by circuit size", "method", *(number(size) for size in sizes))
    for curve in data.curves:
        values = dict(zip(curve.sizes, curve.preservation, strict=True))
        cells = (_share(values[size]) if size in values else "" for size in sizes)
        table.add_row(Text(curve.method, style="" if curve.control else "bold"), *cells)
    return table


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "–"


def _search(data: ReportData) -> Table:
    table = plain_table("Search", "part", "evaluations", "seconds", "nodes changed", "φ before", "φ after")
    for part in data.search:
        table.add_row(
            Text(part.name),
            number(part.evaluations),
            f"{part.seconds:.1f}",
            number(part.changed_nodes),
            percent(part.preservation_before),
            percent(part.preservation_after),
        )
    return table


def _reconstruction(data: ReportData) -> Table:
    slots = data.slot_names if len(data.slot_names) <= MAX_SLOT_COLUMNS else ()
    table = plain_table("Transcoders", "layer", "FVU", "active", "dead", *(f"FVU at {slot}" for slot in slots))
    for layer in data.reconstruction:
        table.add_row(
            str(layer.layer),
            number(layer.fvu),
            number(layer.l0),
            percent(layer.dead),
            *(number(value, 2) for value in layer.slot_fvu[: len(slots)]),
        )
    return table


def _hierarchy(data: ReportData) -> Table:
    table = plain_table("Hierarchy", "level", "supernodes", "modularity", "conductance", "coherence", "random groups")
    for depth, level in enumerate(data.levels, start=1):
        values = (level.modularity, level.conductance, level.coherence, level.coherence_null)
        table.add_row(str(depth), number(len(level.labels)), *(number(value) for value in values))
    return table
