"""The graph of one prompt in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hagd.report.prompt.page import summary
from hagd.report.prompt.records import PromptReport, ScoreView
from hagd.report.terminal import plain_table
from hagd.report.wording import node_label, number, visible

_NODES = 10


def print_prompt(data: PromptReport, console: Console) -> None:
    """The prompt, its predictions and its most influential nodes."""
    console.print()
    console.print(Text(f"{data.model} · one prompt", style="dim"))
    console.print(Text(data.prompt, style="bold"))
    console.print(Text(summary(data)))
    for warning in data.warnings:
        console.print(Text(f"Warning: {warning}", style="yellow"))
    tables = [_predictions(data), _nodes(data)]
    if data.score is not None:
        tables.append(_score(data.score))
    for table in tables:
        console.print(Padding(table, (1, 0, 0, 0)))
    console.print()


def _predictions(data: PromptReport) -> Table:
    table = plain_table("Next token", "token", "probability", "in the graph")
    for each in data.predictions:
        table.add_row(Text(visible(each.text)), f"{number(100 * each.probability)} %", "yes" if each.explained else "")
    return table


def _nodes(data: PromptReport) -> Table:
    table = plain_table("Most influential nodes", "node", "kind", "layer", "position", "value", "influence")
    for node in sorted(data.nodes, key=lambda node: -node.score)[:_NODES]:
        layer = str(node.layer) if node.kind in ("feature", "head", "error") else ""
        place = visible(data.slot_names[node.slot])
        table.add_row(
            Text(node_label(node)), node.kind, layer, Text(place), number(node.mean_activation), number(node.score)
        )
    return table


def _score(score: ScoreView) -> Table:
    table = plain_table(f"Attention score {number(score.score)}, {score.name}", "query reads", "key reads", "term")
    for term in score.terms[:_NODES]:
        table.add_row(Text(visible(term.query)), Text(visible(term.key)), number(term.value))
    return table
