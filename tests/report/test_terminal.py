from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from hagd.report.records import ReportData
from hagd.report.terminal import print_summary


def printed(data: ReportData, width: int = 100) -> str:
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        print_summary(data, console)
    return capture.get()


def test_summary_holds_headline_controls_and_every_stage(report: ReportData) -> None:
    text = printed(report)
    for part in (
        "94.8 % [92.7, 96.9]",
        "random nodes",
        "10.2 %",
        "Warning: transcoder",
        "gates",
        "FVU at =",
        "modularity",
    ):
        assert part in text


def test_what_the_controls_preserve_is_left_out_where_the_model_does_not_do_the_task(report: ReportData) -> None:
    text = printed(replace(report, metrics={**report.metrics, "model.accuracy": 0.01}))
    assert "The model does not do the task" in text and "For comparison" not in text


@pytest.mark.parametrize("width", [80, 120])
def test_no_line_is_wider_than_the_terminal(report: ReportData, width: int) -> None:
    assert max(map(len, printed(report, width).splitlines())) <= width


def test_names_are_never_read_as_markup(report: ReportData) -> None:
    odd = replace(report, slot_names=("[red]a", "[/]", "="), model="[bold]m", warnings=("[/nothing]",))
    text = printed(odd, 140)
    for part in ("[red]a", "[/]", "[bold]m", "[/nothing]"):
        assert part in text


def test_stages_that_did_not_run_have_no_table(report: ReportData) -> None:
    nodes = tuple(replace(node, supernodes=()) for node in report.nodes)
    bare = replace(report, search=(), curves=(), reconstruction=(), levels=(), nodes=nodes)
    text = printed(bare)
    assert "Hierarchy" not in text and "Transcoders" not in text and "Search" not in text
