"""One self-contained page for the graph of one prompt."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from hagd.report import fragments
from hagd.report.html import asset, circuit_view, page_head, publish, scripts
from hagd.report.payload import embed, payload
from hagd.report.prompt.records import PromptReport, ScoreView
from hagd.report.wording import METRIC_NAMES, number, percent, visible


def write_prompt_report(data: PromptReport, path: Path) -> None:
    """Write the page to `path`, replacing an earlier one only when the new one is complete."""
    publish(render(data), path)


def render(data: PromptReport) -> str:
    """The page as text."""
    return Template(asset("prompt.html")).substitute(
        head=page_head(f"HAGD graph: {data.prompt}"),
        run=escape(f"{data.model} · one prompt"),
        headline=escape(data.prompt),
        summary=escape(summary(data)),
        warnings=fragments.warning_lines(data.warnings),
        view=circuit_view("Graph", "Most important nodes", "hides the least important nodes"),
        predictions=_predictions(data),
        score=_score(data.score),
        reconstruction=fragments.reconstruction_table(data.reconstruction),
        metrics=_metrics(data.metrics),
        settings=fragments.settings_table(data.settings),
        data=embed(payload(data)),
        scripts=scripts(),
    )


def summary(data: PromptReport) -> str:
    """One sentence: what is left of what, and how much features explain."""
    found = data.metrics
    heads = f", {number(found['graph.heads'])} attention heads" if "graph.heads" in found else ""
    return (
        f"{number(found['graph.features'])} of {number(found['graph.active_features'])} active features{heads} and "
        f"{number(found['graph.edges'])} of {number(found['graph.edges_computed'])} edges are left; replacement score "
        f"{percent(found['graph.replacement'])}, completeness {percent(found['graph.completeness'])}."
    )


def _predictions(data: PromptReport) -> str:
    rows = [
        (visible(p.text), f"{number(100 * p.probability)} %", "explained" if p.explained else "")
        for p in data.predictions
    ]
    return fragments.table(("Token", "Probability", ""), rows)


def _score(score: ScoreView | None) -> str:
    """The section on an attention score; nothing where none was asked for."""
    if score is None:
        return ""
    rows = [(visible(term.query), visible(term.key), number(term.value)) for term in score.terms]
    return (
        '<section id="score" aria-labelledby="score-title"><h2 id="score-title">Attention score</h2>'
        f'<p class="lead">{escape(score.name)}: {number(score.score)} before softmax. Each term is what a source of '
        f"the query and a source of the key add together; these hold {percent(score.of_all)} of the terms’ sizes.</p>"
        f"{fragments.table(('Query reads', 'Key reads', 'Term'), rows, frozenset({1}))}</section>"
    )


def _metrics(metrics: dict[str, float]) -> str:
    rows = [(METRIC_NAMES.get(key, key), number(value), key) for key, value in sorted(metrics.items())]
    return fragments.table(("Metric", "Value", "Key"), rows, frozenset({2}))
