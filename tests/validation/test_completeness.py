"""Incompleteness is 0 of everything, 1 of nothing, and in between what circuits run by hand say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hagd.patching.objective import Objective
from hagd.pipeline.pipeline import Pipeline
from hagd.search.records import Circuit
from hagd.validation.bench import Bench, Count
from hagd.validation.completeness import completeness_metrics, incompleteness


@pytest.fixture(scope="module")
def bench(pipeline: Pipeline) -> Bench:
    return Bench.of(pipeline.patched, pipeline.get("prompts"), "mean", "keep", pipeline.config.validation, seed=0)


def measured(pipeline: Pipeline, bench: Bench, circuit: Circuit, n: int) -> dict[str, float]:
    return completeness_metrics(bench, pipeline.get("graph"), circuit, n, 0, Count(None, 0))


def test_everything_is_complete_and_nothing_is_not(bench: Bench) -> None:
    everything = Circuit(np.arange(torch.Size(bench.gate_shape).numel()))
    rng = np.random.default_rng(0)
    nothing = Circuit(np.array([], dtype=int))
    of_everything, of_nothing = (
        incompleteness(bench, [each] * 2, rng, Count(None, 0)).value for each in (everything, nothing)
    )
    assert of_everything == pytest.approx(0, abs=1e-6) and of_nothing == pytest.approx(1, abs=1e-5)


def test_figures_agree_with_subsets_removed_by_hand(pipeline: Pipeline, bench: Bench) -> None:
    task, circuit = pipeline.get("prompts"), pipeline.get("search").circuit
    on = Objective(pipeline.patched, task, task.validation, ablation="mean", error="keep", batch_size=7)
    low, high = (float(x.logit_difference.double().mean()) for x in (bench.empty, bench.full))

    def faithfulness(nodes: np.ndarray) -> float:
        outcome = on.outcome(Circuit(nodes).gates(bench.gate_shape))
        return (float(outcome.logit_difference.double().mean()) - low) / (high - low)

    rng, gaps = np.random.default_rng(0), []
    everything = np.arange(torch.Size(bench.gate_shape).numel())
    for _ in range(5):
        removed = circuit.nodes[rng.random(len(circuit)) < 0.5]
        within, whole = (np.setdiff1d(nodes, removed) for nodes in (circuit.nodes, everything))
        gaps.append(abs(faithfulness(within) - faithfulness(whole)))
    found = measured(pipeline, bench, circuit, 5)
    name = "validation.incompleteness"
    assert found[name] == pytest.approx(np.mean(gaps), rel=1e-4) and found[name] > 0.1
    assert found[f"{name}.low"] <= found[name] <= found[f"{name}.high"]
    assert found["control.random.incompleteness"] > found[name]


def test_it_can_be_left_out(pipeline: Pipeline, bench: Bench) -> None:
    assert measured(pipeline, bench, pipeline.get("search").circuit, 0) == {}
