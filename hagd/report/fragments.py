"""Parts of the page that need no script: verdict, comparison bars, tables. Every text is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from hagd.report.records import LayerReconstruction, ReportData
from hagd.report.wording import METRIC_NAMES, bounds, comparisons, number, percent, verdict


def verdict_line(data: ReportData) -> str:
    """What this run shows against its controls."""
    standing, sentence = verdict(data)
    return f'<p class="verdict {standing}">{escape(sentence)}</p>'


def warning_lines(warnings: Iterable[str]) -> str:
    """One paragraph a warning."""
    return "".join(f'<p class="warning">{escape(warning)}</p>' for warning in warnings)


def comparison_bars(data: ReportData) -> str:
    """Preservation of the circuit and of each control as bars with their intervals."""
    own = ("this circuit", data.metrics["validation.preservation"], data.interval("validation.preservation"), " own")
    rows = [own, *((item.control, item.preservation, item.interval, "") for item in comparisons(data))]
    scale = max([1.0, *(end for _, value, bound, _ in rows for end in (value, *(bound or ())) if math.isfinite(end))])
    parts = []
    for name, value, interval, own_class in rows:
        filled = value / scale if math.isfinite(value) else 0.0
        whisker = ""
        if interval is not None:
            low, high = (min(max(bound / scale, 0), 1) for bound in interval)
            whisker = f'<b style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%"></b>'
        bar = f'<i style="width:{100 * max(filled, 0):.2f}%"></i>{whisker}'
        parts.append(
            f'<dt class="{own_class.strip()}">{escape(name)}</dt>'
            f'<dd class="gauge{own_class}" aria-hidden="true">{bar}</dd>'
            f"<dd>{percent(value)} {bounds(interval)}</dd>"
        )
    return f'<dl class="comparison" aria-label="Preservation at the same size">{"".join(parts)}</dl>'


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], text_columns: frozenset[int] = frozenset()) -> str:
    """A table of texts; the first column names the row, `text_columns` are set flush left."""
    kind = [' class="text"' if index in text_columns else "" for index in range(len(columns))]
    head = "".join(f'<th scope="col"{style}>{escape(name)}</th>' for name, style in zip(columns, kind, strict=True))
    body = ""
    for name, *others in rows:
        cells = "".join(f"<td{style}>{escape(c)}</td>" for c, style in zip(others, kind[1:], strict=True))
        body += f'<tr><th scope="row"{kind[0]}>{escape(name)}</th>{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def curve_table(data: ReportData) -> str:
    """The values of the curves."""
    columns = ("Method", "Nodes", "Preservation", "95 % interval", "Faithfulness")
    rows = [
        (
            curve.method,
            number(size),
            percent(curve.preservation[i]),
            _curve_bounds(curve.low, curve.high, i),
            number(curve.faithfulness[i]),
        )
        for curve in data.curves
        for i, size in enumerate(curve.sizes)
    ]
    return f"<details><summary>Table of curves</summary>{table(columns, rows)}</details>" if rows else ""


def _curve_bounds(low: tuple[float, ...], high: tuple[float, ...], index: int) -> str:
    return bounds((low[index], high[index])) if low else "–"


def search_table(data: ReportData) -> str:
    """Each part of the search: what it changed and what it cost."""
    columns = ("Part", "Evaluations", "Seconds", "Nodes changed", "Preservation before", "after", "Note")
    rows = [
        (
            part.name,
            number(part.evaluations),
            f"{part.seconds:.1f}",
            number(part.changed_nodes),
            percent(part.preservation_before),
            percent(part.preservation_after),
            part.note,
        )
        for part in data.search
    ]
    return table(columns, rows, frozenset({6})) if rows else "<p>No search ran.</p>"


def reconstruction_table(layers: Sequence[LayerReconstruction], slot_names: Sequence[str] = ()) -> str:
    """FVU per layer and slot, shaded from none to the worst of the table."""
    if not layers:
        return "<p>No layer was decomposed.</p>"
    values = [value for record in layers for value in (record.fvu, *record.slot_fvu) if math.isfinite(value)]
    worst = max([*values, 1e-12])
    columns = ("Layer", "FVU", "Active features", "Dead features", *(f"FVU at {slot}" for slot in slot_names))
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    body = ""
    for record in layers:
        slots = (*record.slot_fvu, *[math.nan] * (len(slot_names) - len(record.slot_fvu)))
        plain = f"<td>{number(record.l0)}</td><td>{percent(record.dead)}</td>"
        heat = "".join(_heat_cell(value, worst) for value in slots)
        body += f'<tr><th scope="row">{record.layer}</th>{_heat_cell(record.fvu, worst)}{plain}{heat}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _heat_cell(value: float, worst: float) -> str:
    share = value / worst if math.isfinite(value) else 0.0
    return f'<td style="background:rgba(var(--heat),{0.55 * max(share, 0):.3f})">{number(value)}</td>'


def hierarchy_table(data: ReportData) -> str:
    """Quality of the partition at each level."""
    columns = ("Level", "Supernodes", "Modularity", "Eigengap", "Conductance", "Coherence", "Random groups")
    rows = [
        (
            str(depth),
            number(len(level.supernodes)),
            *map(number, (level.modularity, level.eigengap, level.conductance)),
            *map(number, (level.coherence, level.coherence_null)),
        )
        for depth, level in enumerate(data.levels, start=1)
    ]
    return table(columns, rows) if rows else "<p>The hierarchy was switched off.</p>"


def metrics_table(data: ReportData) -> str:
    """Every metric, known ones first and named, with intervals and keys."""
    bounded = {key for key in data.metrics if key.endswith((".low", ".high")) and key.rsplit(".", 1)[0] in data.metrics}
    known = [key for key in METRIC_NAMES if key in data.metrics]
    others = sorted(set(data.metrics) - set(known) - bounded)
    rows = []
    for key in (*known, *others):
        interval = data.interval(key)
        between = "" if interval is None else f"[{number(interval[0])}, {number(interval[1])}]"
        rows.append((METRIC_NAMES.get(key, key), number(data.metrics[key]), between, key))
    return table(("Metric", "Value", "95 % interval", "Key"), rows, frozenset({3}))


def settings_table(settings: Mapping[str, str]) -> str:
    """The resolved configuration."""
    return table(("Key", "Value"), sorted(settings.items()), frozenset({1}))
