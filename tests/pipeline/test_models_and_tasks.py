"""The whole chain with other models and tasks, and with models that answer little or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hagd.errors import TaskError
from hagd.pipeline.pipeline import Pipeline
from tests.builders import tiny_extract
from tests.pipeline.extractions import QUIET, extract, reused


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
@pytest.mark.usefixtures("undrawn")
def test_other_architectures(tiny_runs: Path, tmp_path: Path, architecture: str) -> None:
    metrics = extract(tiny_extract(tiny_runs, model__architecture=architecture), tmp_path)
    assert metrics["circuit.nodes"] == 8 and reused(tmp_path) == {"task"}


@pytest.mark.parametrize(
    "task",
    [
        pytest.param({"name": "modular_arithmetic", "p": 11}, id="modular_arithmetic", marks=pytest.mark.slow),
        pytest.param({"name": "parity", "length": 6}, id="parity", marks=pytest.mark.slow),
    ],
)
def test_other_tasks(tiny_runs: Path, tmp_path: Path, task: dict[str, object]) -> None:
    training = tiny_extract(tiny_runs).task.model_dump()["training"]
    sizes = {"n_train": 30, "n_discovery": 12, "n_selection": 8, "n_validation": 10, "only_correct": False}
    metrics = extract(tiny_extract(tiny_runs, task={**task, **sizes, "training": training}), tmp_path)
    assert metrics["circuit.nodes"] == 8


def test_a_model_that_answers_nothing_still_gets_its_report(tiny_runs: Path, tmp_path: Path) -> None:
    task = {**tiny_extract(tiny_runs).task.model_dump(), "only_correct": False}
    task["training"] = {**task["training"], "steps": 1, "learning_rate": 1e-8}
    metrics = extract(tiny_extract(tiny_runs, task=task, transcoder__steps=5), tmp_path)
    assert metrics["model.accuracy"] == 0
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert "validation.preservation" not in written  # undefined, and JSON has no NaN
    report = (tmp_path / "report.html").read_text()
    shown = report.split("<script")[0]
    assert "preservation is undefined" in shown and not re.search(r"\bnan\b", shown, re.IGNORECASE)


@pytest.mark.usefixtures("undrawn")
def test_a_model_below_its_target_is_reported_also_when_it_is_reused(tiny_runs: Path, tmp_path: Path) -> None:
    task = tiny_extract(tiny_runs).task.model_dump()
    for target, warned in ((1.0, True), (0.0, False)):
        task["training"] = {**task["training"], "steps": 10, "target_accuracy": target}
        config = tiny_extract(tiny_runs, task=task, transcoder__steps=5, search__method="random")
        Pipeline(config, QUIET).get("lm")
        metrics = extract(config, tmp_path / str(target))
        assert 0 < metrics["model.accuracy"] < 1
        report = (tmp_path / str(target) / "report.html").read_text()
        answers = f"the full model answers {metrics['model.accuracy']:.1%} of the validation prompts correctly"
        sentence = f"{answers}, expected at least {target:.0%}"
        assert (sentence in report) == warned


def test_a_model_that_answers_no_discovery_prompt_is_refused(tiny_runs: Path) -> None:
    task = tiny_extract(tiny_runs).task.model_dump()
    task["training"] = {**task["training"], "steps": 1, "learning_rate": 1e-8}
    with pytest.raises(TaskError, match=r"none of the 24 discovery prompts.*task\.training\.steps"):
        Pipeline(tiny_extract(tiny_runs, task=task), QUIET).get("prompts")
