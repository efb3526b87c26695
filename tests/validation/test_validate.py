"""The validation split is read by validation alone, and its figures agree with circuits run by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from hagd.attribution.records import HEAD
from hagd.config.stages import Ablation
from hagd.hierarchy.records import Hierarchy
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.pipeline import stages
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.progress import StageProgress
from hagd.search.records import Circuit
from hagd.tasks.records import Prompts, TaskData
from hagd.validation.random_circuits import random_matched
from hagd.validation.records import Validation
from hagd.validation.validate import validate
from tests.builders import tiny_extract
from tests.hierarchy.graphs import feature_graph

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def pipeline(tiny_runs: Path) -> Pipeline:
    built = Pipeline(tiny_extract(tiny_runs), QUIET)
    built.get("report")
    return built


def poisoned(prompts: Prompts) -> Prompts:
    """Other tokens, answers and distractors of the same shape."""
    g = torch.Generator().manual_seed(9)

    def scrambled(values: torch.Tensor) -> torch.Tensor:
        return torch.where(values >= 0, torch.randint(12, values.shape, generator=g), values)

    names = ("tokens", "counterfactual", "answers", "distractors")
    return replace(prompts, **{name: scrambled(getattr(prompts, name)) for name in names})


def run(pipeline: Pipeline, task: TaskData, ablation: Ablation = "mean", **changes: Any) -> Validation:
    controls = {"attribution": pipeline.get("graph").nodes.importance[: pipeline.get("graph").n_candidates]}
    options = {"result": pipeline.get("search"), "grid": (4, 16)} | changes
    return validate(
        pipeline.patched,
        task,
        pipeline.get("graph"),
        controls=controls,
        ablation=ablation,
        config=pipeline.config.validation,
        seed=0,
        **options,
    )


def test_validation_reads_no_other_split(pipeline: Pipeline) -> None:
    task = pipeline.get("prompts")
    clean = run(pipeline, task)
    other = run(pipeline, replace(task, discovery=poisoned(task.discovery), selection=poisoned(task.selection)))
    assert clean == other
    wrong = run(pipeline, replace(task, validation=poisoned(task.validation)))
    assert wrong.metrics["model.accuracy"] != clean.metrics["model.accuracy"]


def test_no_stage_before_it_reads_the_validation_split(pipeline: Pipeline, tmp_path: Path) -> None:
    config, task = pipeline.config, pipeline.get("prompts")
    other = replace(task, validation=poisoned(task.validation))
    with StageProgress("test", QUIET) as progress:
        assert stages.select_prompts(config, pipeline.lm, replace(pipeline.get("task"), validation=other.validation))
        kept = stages.select_prompts(config, pipeline.lm, replace(pipeline.get("task"), validation=other.validation))
        assert torch.equal(kept.discovery.tokens, task.discovery.tokens)
        assert torch.equal(kept.selection.tokens, task.selection.tokens)
        dictionaries = stages.fit_transcoders(config, pipeline.lm, other, tmp_path, tmp_path, [], progress)
        for ours, theirs in zip(dictionaries.transcoders, pipeline.get("transcoders").transcoders, strict=True):
            assert torch.equal(ours.W_enc, theirs.W_enc) and torch.equal(ours.W_dec, theirs.W_dec)
        means = stages.measure_means(config, pipeline.lm, other, dictionaries)
        patched = PatchedModel(pipeline.lm, dictionaries, means)
        graph = stages.attribute(config, patched, other, progress)
        assert np.array_equal(graph.flat, pipeline.get("graph").flat)
        assert np.array_equal(graph.edge_attr, pipeline.get("graph").edge_attr)
        hierarchy: Hierarchy = stages.partition(config, patched, other, graph, progress)
        result = stages.search(config, patched, other, graph, hierarchy, None, progress)
    for ours, theirs in zip(result.circuits, pipeline.get("search").circuits, strict=True):
        assert np.array_equal(ours.nodes, theirs.nodes)


def test_figures_agree_with_circuits_run_by_hand(pipeline: Pipeline) -> None:
    task, result = pipeline.get("prompts"), pipeline.get("search")
    metrics = run(pipeline, task).metrics
    shape = pipeline.patched.gate_shape
    gates = result.circuit.gates(shape)
    rest = Circuit(np.setdiff1d(np.arange(gates.numel()), result.circuit.nodes)).gates(shape)

    def measured(ablation: Any, error: Any) -> tuple[Any, ...]:
        on = Objective(pipeline.patched, task, task.validation, ablation=ablation, error=error, batch_size=7)
        return on.full(), on.outcome(torch.zeros(shape)), on.outcome(gates), on.outcome(rest)

    full, empty, ours, _ = measured("mean", "mean")
    assert metrics["model.accuracy"] == full.accuracy and metrics["empty.accuracy"] == empty.accuracy
    assert metrics["validation.preservation"] == pytest.approx(ours.accuracy / full.accuracy)
    mean = [float(x.logit_difference.mean()) for x in (ours, empty, full)]
    assert metrics["validation.faithfulness"] == pytest.approx((mean[0] - mean[1]) / (mean[2] - mean[1]), rel=1e-4)
    full, empty, ours, complement = measured("mean", "keep")
    mean = [float(x.logit_difference.mean()) for x in (ours, empty, full, complement)]
    assert metrics["validation.preservation_lenient"] == pytest.approx(ours.accuracy / full.accuracy)
    assert metrics["validation.sufficiency"] == pytest.approx((mean[0] - mean[1]) / (mean[2] - mean[1]), rel=1e-4)
    necessity = 1 - (mean[3] - mean[1]) / (mean[2] - mean[1])
    assert metrics["validation.necessity"] == pytest.approx(necessity, rel=1e-4, abs=1e-5)
    assert (
        metrics["validation.necessity.low"] <= metrics["validation.necessity"] <= metrics["validation.necessity.high"]
    )
    full, empty, ours, _ = measured("resample", "mean")
    assert metrics["validation.preservation_resample"] == pytest.approx(ours.accuracy / full.accuracy)

    resampled = run(pipeline, task, "resample").metrics
    assert resampled["validation.preservation"] == metrics["validation.preservation_resample"]
    assert resampled["validation.preservation_mean"] == metrics["validation.preservation"]
    assert resampled["empty.accuracy"] == empty.accuracy and "validation.preservation_resample" not in resampled


def test_necessity_ablates_nothing_but_the_circuit(tiny_runs: Path) -> None:
    """Also where most features that are active are no candidates."""
    built = Pipeline(tiny_extract(tiny_runs, graph__n_max=10), QUIET)
    task, gates = built.get("prompts"), built.get("search").circuit.gates(built.patched.gate_shape)
    on = Objective(built.patched, task, task.validation, ablation="mean", error="keep", batch_size=64)
    rest, empty, full = (
        float(x.logit_difference.mean()) for x in (on.outcome(1 - gates), on.outcome(0 * gates), on.full())
    )
    assert built.get("validation").metrics["validation.necessity"] == pytest.approx(
        1 - (rest - empty) / (full - empty), rel=1e-4, abs=1e-5
    )


def test_areas_do_not_depend_on_the_reported_size(pipeline: Pipeline) -> None:
    """Circuits of 4, 8 and 16 nodes, the areas over 4 and 16."""
    task, result = pipeline.get("prompts"), pipeline.get("search")
    assert [len(circuit) for circuit in result.circuits] == [4, 8, 16] and result.size == 8
    with_it = run(pipeline, task)
    without = run(pipeline, task, result=replace(result, size=4, circuits=result.circuits[::2]))
    for name in ("curve.cpr_log", "curve.cpr", "curve.cmd", "control.attribution.cpr_log"):
        assert with_it.metrics[name] == without.metrics[name]


def test_curves_and_controls(pipeline: Pipeline) -> None:
    found = run(pipeline, pipeline.get("prompts"))
    assert [curve.method for curve in found.curves] == ["circuit", "attribution", "random"]
    assert all(curve.sizes == (4, 8, 16) for curve in found.curves)
    reported = found.curves[0]
    assert reported.preservation[1] == found.metrics["validation.preservation"]
    assert reported.low[1] == found.metrics["validation.preservation.low"]
    task, graph = pipeline.get("prompts"), pipeline.get("graph")
    on = Objective(pipeline.patched, task, task.validation, ablation="mean", error="mean", batch_size=64)
    draws = random_matched(graph, pipeline.get("search").circuit, 3, 0)
    shape = pipeline.patched.gate_shape
    by_hand = [on.outcome(draw.gates(shape)).accuracy / on.full().accuracy for draw in draws]
    assert found.metrics["control.random.preservation"] == pytest.approx(np.mean(by_hand))


def test_progress_reaches_its_total(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    run(pipeline, pipeline.get("prompts"), progress=lambda done, total: seen.append((done, total)))
    n = 3 * (1 + 1 + 3) + 2 * 8 + 4 * 4  # sizes × (circuit, attribution, random draws), nodes, subsets
    assert seen == [(i + 1, n) for i in range(n)]


def test_random_circuits_have_as_many_nodes_in_each_layer_and_slot(pipeline: Pipeline) -> None:
    graph, circuit = pipeline.get("graph"), pipeline.get("search").circuits[-1]
    _, n_slots, m = pipeline.patched.gate_shape

    def cells(nodes: np.ndarray) -> dict[tuple[int, int], int]:
        counts: dict[tuple[int, int], int] = {}
        for node in nodes.tolist():
            cell = (node // m // n_slots, node // m % n_slots)
            counts[cell] = counts.get(cell, 0) + 1
        return counts

    draws = random_matched(graph, circuit, 20, seed=0)
    assert len(cells(circuit.nodes)) > 1
    for draw in draws:
        assert cells(draw.nodes) == cells(circuit.nodes)
        assert set(draw.nodes) <= set(graph.flat) and len(set(draw.nodes)) == len(circuit)
        assert np.array_equal(draw.nodes, np.sort(draw.nodes))
    assert len({tuple(draw.nodes) for draw in draws}) > 1
    again = random_matched(graph, circuit, 20, seed=0)
    assert all(np.array_equal(a.nodes, b.nodes) for a, b in zip(draws, again, strict=True))


def test_random_circuits_have_as_many_heads() -> None:
    graph = feature_graph(40, [], [], [])
    graph.nodes.kind[::4] = HEAD
    graph.nodes.layer[20:], graph.nodes.slot[:] = 1, np.arange(40) % 2
    circuit = Circuit(np.array([0, 1, 3, 4, 12, 13, 22, 28]))
    cells = list(zip(graph.nodes.kind.tolist(), graph.nodes.layer.tolist(), graph.nodes.slot.tolist(), strict=True))
    wanted = sorted(cells[node] for node in circuit.nodes)
    draws = random_matched(graph, circuit, 10, seed=0)
    assert all(sorted(cells[node] for node in draw.nodes) == wanted for draw in draws)
    assert len({tuple(draw.nodes) for draw in draws}) > 1


def test_a_random_circuit_of_everything_is_everything(pipeline: Pipeline) -> None:
    graph = pipeline.get("graph")
    (draw,) = random_matched(graph, Circuit(np.sort(graph.flat)), 1, 0)
    assert np.array_equal(draw.nodes, np.sort(graph.flat))
