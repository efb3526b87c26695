from __future__ import annotations

from dataclasses import replace

from made_prompt_graph import made_graph, made_report
from rich.console import Console

from hagd.report.prompt.records import Prediction, ScoreTerm, ScoreView
from hagd.report.prompt.terminal import print_prompt

METRICS = {
    "graph.features": 1.0,
    "graph.active_features": 2.0,
    "graph.edges": 1.0,
    "graph.edges_computed": 2.0,
    "graph.replacement": 0.5,
    "graph.completeness": 0.5,
}


def test_small_probabilities_are_not_rounded_to_nothing() -> None:
    rare = Prediction(" rare", 0.000341, explained=True)
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        print_prompt(replace(made_report(made_graph()), metrics=METRICS, predictions=(rare,)), console)
    assert " 0.0341 % " in capture.get()


def test_tokens_are_never_read_as_markup() -> None:
    score = ScoreView("layer 0, head 0: from 2 [/INST] to 1 [bold]", 1.0, 0.5, (ScoreTerm("[a]", "[/b]", 0.1),))
    console = Console(width=100, force_terminal=False)
    with console.capture() as capture:
        print_prompt(replace(made_report(made_graph()), metrics=METRICS, score=score), console)
    text = " ".join(capture.get().split())
    for part in ("2 [/INST]", "1 [bold]", "[a] [/b]"):
        assert part in text
