from __future__ import annotations

from dataclasses import replace

import pytest

from hagd.report.records import ReportData
from hagd.report.wording import (
    comparisons,
    control_line,
    headline,
    node_label,
    number,
    percent,
    poor_model,
    verdict,
    visible,
    warnings,
)


def with_metrics(data: ReportData, **changes: float | None) -> ReportData:
    """The report with metrics set (dots written as double underscores), or removed where None."""
    metrics = dict(data.metrics)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del metrics[name]
        else:
            metrics[name] = value
    return replace(data, metrics=metrics)


def test_headline_counts_heads(report: ReportData) -> None:
    metrics = {**report.metrics, "circuit.nodes": 1200.0, "circuit.features": 1150.0, "circuit.heads": 50.0}
    found = headline(replace(report, metrics=metrics, circuits=()))
    assert found.startswith("A circuit of 1,200 nodes (1,150 features, 50 heads) preserves")


def test_headline_states_size_interval_and_prompts(report: ReportData) -> None:
    assert headline(report) == (
        "A circuit of 192 nodes preserves 94.8 % [92.7, 96.9] of the model’s accuracy on 512 held-out prompts"
    )
    assert control_line(report) == (
        "For comparison: the empty circuit 8.0 %; at the same size random nodes 10.2 % [9.0, 11.5] "
        "and integrated gradients 89.4 % [86.6, 92.1]."
    )


def test_empty_circuit_is_compared_on_the_scale_of_preservation(report: ReportData) -> None:
    empty = comparisons(with_metrics(report, model__accuracy=0.5))[0]
    assert empty.control == "empty circuit"
    assert empty.preservation == pytest.approx(0.16)


def test_intervals_apart_allow_a_claim(report: ReportData) -> None:
    standing, sentence = verdict(report)
    assert standing == "above"
    assert sentence == "Its 95 % interval lies above the empty circuit, random nodes and integrated gradients."


def test_overlap_with_one_control_is_said(report: ReportData) -> None:
    standing, sentence = verdict(with_metrics(report, control__attribution__preservation__high=0.93))
    assert standing == "overlaps"
    assert "integrated gradients" in sentence and "random" not in sentence
    assert "does not show" in sentence


def test_a_better_control_outweighs_an_overlap(report: ReportData) -> None:
    worse = with_metrics(
        report, control__random__preservation__low=0.98, control__random__preservation__high=0.99, empty__accuracy=0.95
    )
    standing, sentence = verdict(worse)
    assert standing == "below"
    assert "random nodes" in sentence


def test_no_claim_without_an_interval(report: ReportData) -> None:
    bare = with_metrics(report, validation__preservation__low=None, validation__preservation__high=None)
    assert verdict(bare)[0] == "overlaps"
    assert "preserves 94.8 % of" in headline(bare)


@pytest.mark.parametrize("accuracy", [0.0, 0.01, 1 / 59])
def test_nothing_is_preserved_of_a_model_that_does_not_do_its_task(report: ReportData, accuracy: float) -> None:
    guessing = with_metrics(report, model__accuracy=accuracy, validation__preservation=2.0)
    assert headline(guessing) == (
        f"The model does not do the task: it answers {percent(accuracy)} of 512 held-out prompts correctly, "
        "a uniform guess 1.7 %"
    )
    standing, sentence = verdict(guessing)
    assert standing == "below" and sentence.startswith("There is nothing that this circuit of 192 nodes could preserve")


def of_all_candidates(report: ReportData) -> ReportData:
    same = {f"control.{name}.preservation.high": 0.96 for name in ("attribution", "random")}
    return replace(report, metrics={**report.metrics, **same, "graph.features": report.metrics["circuit.nodes"]})


def test_no_seed_tells_the_circuit_of_all_candidates_from_its_controls(report: ReportData) -> None:
    standing, sentence = verdict(of_all_candidates(report))
    assert standing == "overlaps" and "seeds may decide" not in sentence
    assert sentence.startswith("The circuit is all 192 candidates, and so is every control of its size")
    lively = with_metrics(of_all_candidates(report), empty__accuracy=0.95 * report.metrics["model.accuracy"])
    assert "the empty circuit" in verdict(lively)[1]


@pytest.mark.parametrize(("n_nodes", "target", "missed"), [("null", 0.99, 1), ("null", 0.9, 0), ("192", 0.99, 0)])
def test_a_search_that_misses_its_target_is_warned_of(
    report: ReportData, n_nodes: str, target: float, missed: int
) -> None:
    settings = {"search.n_nodes": n_nodes, "search.target_preservation": str(target)}
    found = warnings(replace(of_all_candidates(report), settings=settings))
    assert found[: len(report.warnings)] == report.warnings and len(found) == len(report.warnings) + missed
    assert not missed or "not even all 192 candidates keep search.target_preservation=0.99" in found[-1]
    assert warnings(replace(report, settings=settings)) == report.warnings, "a smaller circuit kept it"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0.00523, "0.00523"),
        (3155, "3,155"),
        (98412.4, "98,412"),
        (999.4, "999"),
        (999.7, "1,000"),
        (-999.9, "-1,000"),
        (0.5, "0.5"),
        (0, "0"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_numbers_of_two_digits_have_no_exponent() -> None:
    assert [number(value, 2) for value in (0.123, 12.3, 99.7, 123.4)] == ["0.12", "12", "100", "123"]


def test_percent_of_nothing_is_a_dash() -> None:
    assert percent(float("nan")) == "–"


@pytest.mark.parametrize(
    ("accuracy", "target", "said"),
    [
        (0.0, 0.99, "preservation is undefined"),
        (0.4, 0.99, "40.0% of the validation prompts correctly, expected at least 99%"),
        (0.1875, 0.0, "18.8% of the validation prompts correctly, no more than a uniform guess (25.0%)"),
        (0.25, 0.0, "no more than a uniform guess"),
    ],
)
def test_a_model_that_hardly_does_its_task_is_warned_of(accuracy: float, target: float, said: str) -> None:
    assert said in (poor_model(accuracy, 0.25, target) or "")


def test_a_model_that_does_its_task_is_not_warned_of() -> None:
    assert poor_model(0.3, 0.25, 0.0) is None and poor_model(1.0, 0.25, 0.99) is None


def test_labels_show_white_space_and_fall_back_to_promoted_tokens(report: ReportData) -> None:
    node = next(node for node in report.nodes if node.kind == "feature")
    assert visible(" Paris") == "␣Paris"
    assert node_label(replace(node, promoted=((" a", 2.0), ("b", 1.0)))) == "␣a b"
    assert node_label(replace(node, promoted=(), feature=7)) == "feature 7"
    assert node_label(replace(node, label="sums near 3")) == "sums near 3"
