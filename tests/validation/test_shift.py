"""Figures of other wordings are those of the validation when the prompts are those of the validation."""

from __future__ import annotations

import pytest
import torch

from hagd.patching.objective import Objective
from hagd.pipeline.objectives import discovery_objective
from hagd.pipeline.pipeline import Pipeline
from hagd.search.baselines import by_method
from hagd.tasks.records import Prompts
from hagd.validation.shift import measure_shift


def measured(pipeline: Pipeline, shifted: Prompts) -> tuple[dict[str, float], list[tuple[int, int]]]:
    seen: list[tuple[int, int]] = []
    task, graph, config = pipeline.get("prompts"), pipeline.get("graph"), pipeline.config
    found = measure_shift(
        pipeline.patched,
        task,
        shifted,
        graph,
        pipeline.get("search").circuit,
        by_method(discovery_objective(config, pipeline.patched, task), graph, config.graph, "integrated_gradients"),
        "mean",
        config.validation,
        config.seed,
        lambda done, total: seen.append((done, total)),
    )
    return found.metrics, seen


def test_on_the_prompts_of_the_validation_figures_are_its_own(pipeline: Pipeline) -> None:
    found, seen = measured(pipeline, pipeline.get("prompts").validation)
    expected = pipeline.get("validation").metrics
    assert seen == [(i + 1, 5) for i in range(5)]  # circuit, integrated gradients, 3 random draws
    assert found["shift.n_prompts"] == expected["validation.n_prompts"]
    assert found["shift.model_accuracy"] == expected["model.accuracy"]
    assert found["shift.empty_accuracy"] == expected["empty.accuracy"]
    for name in ("preservation", "faithfulness"):
        for end in ("", ".low", ".high"):
            assert found[f"shift.{name}{end}"] == expected[f"validation.{name}{end}"]
    for control in ("random", "attribution"):
        name = f"shift.{control}.preservation"
        assert found[name] == pytest.approx(expected[f"control.{control}.preservation"])
        assert found[f"{name}.low"] == pytest.approx(expected[f"control.{control}.preservation.low"])


def test_they_are_of_the_prompts_that_are_given(pipeline: Pipeline) -> None:
    some = pipeline.get("prompts").validation[torch.tensor([0, 3, 5])]
    found, _ = measured(pipeline, some)
    on = Objective(pipeline.patched, pipeline.get("prompts"), some, ablation="mean", error="mean", batch_size=8)
    assert found["shift.n_prompts"] == 3 and found["shift.model_accuracy"] == on.full().accuracy
