"""Measurements that a job has beside its report: asked for by the configuration, stored, shown."""

from __future__ import annotations

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hagd.errors import ConfigError, HagdError
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.finished import finished_job
from hagd.pipeline.job_key import job_key
from hagd.pipeline.measurements import Extracted, _without, compare_circuits, measurements
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.progress import StageProgress
from hagd.tables.cost import estimate
from hagd.tables.definition import Cell
from hagd.tables.runs import finished_runs
from hagd.tables.view import CellRuns
from tests.builders import random_prompts, tiny_extract, tiny_settings

QUIET = Console(quiet=True)
MODEL = tiny_settings(Path("a"))["model"]
ITSELF: dict[str, Any] = {"model": MODEL, "seed_offset": 0, "n_null": 5, "n_bootstrap": 10}


@pytest.mark.usefixtures("undrawn")
def test_a_job_with_both(tiny_runs: Path, tmp_path: Path) -> None:
    config = tiny_extract(tiny_runs, validation__dark_matter=True, comparison=ITSELF)
    returned = run_extraction(config, tmp_path, None, QUIET)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["comparison.similarity"] == pytest.approx(1) == returned["comparison.similarity"]
    assert 0 <= metrics["dark_matter.layer1.probe_error"] <= 1
    assert metrics["dark_matter.all.lost_mean.low"] <= metrics["dark_matter.all.lost_mean"]
    assert metrics["dark_matter.all.lost_mean"] == pytest.approx(
        1 - metrics["transcoder.spliced_accuracy"] / metrics["model.accuracy"]
    ), "two ways to the same figure"
    assert "dark_matter.all.lost_mean" in (tmp_path / "report.html").read_text()
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    assert {name for name, stage in stages.items() if not stage["reused"]} == {"dark_matter", "comparison"}


@pytest.mark.usefixtures("undrawn")
def test_the_own_results_are_written_when_the_other_extraction_fails(tiny_runs: Path, tmp_path: Path) -> None:
    config = tiny_extract(tiny_runs, comparison={**ITSELF, "model": {**MODEL, "name": "narrow", "d_mlp": 32}})
    blocked = tiny_runs / "artifacts" / "lm" / Pipeline(config, QUIET).compared.key("lm")
    blocked.touch()
    problem = rf"comparison with narrow \(comparison\.model\): {blocked}: cannot be used"
    with pytest.raises(HagdError, match=f"{problem}.*; the other results are in {tmp_path}"):
        run_extraction(config, tmp_path, None, QUIET)
    blocked.unlink()
    assert json.loads((tmp_path / "metrics.json").read_text())["circuit.nodes"] == 8
    assert (tmp_path / "circuit.json").is_file()
    assert "comparison with narrow" in (tmp_path / "report.html").read_text()
    assert finished_job(config) is None and job_key(config) not in finished_runs(tiny_runs)


@pytest.mark.slow
def test_the_other_extraction_comes_first_while_another_process_makes_the_own_one(tmp_path: Path) -> None:
    config = tiny_extract(tmp_path, comparison={**ITSELF, "seed_offset": 1})
    own = Pipeline(config, QUIET)
    others, lm = own.compared.key("search"), own.key("lm")
    own.get("task")
    locked, deadline = threading.Event(), time.monotonic() + 60

    def another_process() -> None:
        with own.store._locked(own.store.root / "lm" / lm):
            locked.set()
            while not own.store.contains("search", others) and time.monotonic() < deadline:
                time.sleep(0.02)

    thread = threading.Thread(target=another_process)
    thread.start()
    assert locked.wait(10) and own.waits("search") and not own.compared.waits("search")
    run_extraction(config, tmp_path / "run", None, QUIET)
    thread.join()
    assert time.monotonic() < deadline
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["comparison.similarity"] < 1


def test_they_are_jobs_of_their_own_and_change_no_stage() -> None:
    plain = tiny_extract(Path("a"))
    wide = {**MODEL, "d_mlp": 32}
    others = [
        tiny_extract(Path("a"), validation__dark_matter=True),
        *(
            tiny_extract(Path("a"), comparison={**ITSELF, **changes})
            for changes in ({}, {"seed_offset": 1}, {"model": wide}, {"n_null": 6})
        ),
    ]
    keys = {job_key(config) for config in (plain, *others)}
    assert len(keys) == 1 + len(others)
    stages = ("validation", "report")
    for config in others:
        assert [Pipeline(config, QUIET).key(name) for name in stages] == [
            Pipeline(plain, QUIET).key(name) for name in stages
        ]
    assert [measurements(config) for config in (plain, *others[:2])] == [(), ("dark_matter",), ("comparison",)]


def test_the_other_extraction_is_that_of_its_own_configuration() -> None:
    """So both share what is stored, whichever is computed first."""
    compared = Pipeline(tiny_extract(Path("a"), comparison={**ITSELF, "seed_offset": 2}), QUIET).compared
    assert compared.key("search") == Pipeline(tiny_extract(Path("a"), seed=2), QUIET).key("search")


def test_what_the_other_extraction_lacks_is_in_the_estimate(tiny_runs: Path) -> None:
    config = tiny_extract(tiny_runs, comparison={**ITSELF, "seed_offset": 3})
    missing = CellRuns(Cell({}, {0: config}), {0: "key"}, {}, {})
    compared = Pipeline(config, QUIET).compared
    found = estimate(missing, 0, [missing], [], tiny_runs).stages
    assert {compared.key("lm"), compared.key("search"), Pipeline(config, QUIET).key("comparison")} <= set(found)
    assert compared.key("validation") not in found and Pipeline(config, QUIET).key("report") not in found


def test_settings_that_do_not_fit_the_other_model_are_refused_before_anything_runs(tmp_path: Path) -> None:
    narrow = {**MODEL, "d_model": 8}
    config = tiny_extract(tmp_path, comparison={**ITSELF, "model": narrow}, transcoder__k=30)
    with pytest.raises(ConfigError, match=r"comparison: expected settings that fit comparison\.model too.*k must be"):
        run_extraction(config, tmp_path / "run", None, QUIET)
    assert not (tmp_path / "artifacts").exists()


def test_models_that_read_other_prompts_are_refused(tiny_runs: Path) -> None:
    config = tiny_extract(tiny_runs, comparison=ITSELF)
    p = Pipeline(config, QUIET)
    ours = Extracted(p.patched, p.get("prompts"), p.get("graph"), p.get("search"))
    for change, what in (({"slot_names": ("a",)}, "slots"), ({"vocabulary": ("x",)}, "a vocabulary")):
        other = replace(ours, task=replace(ours.task, **change))
        with (
            StageProgress("test", QUIET) as progress,
            pytest.raises(ConfigError, match=rf"comparison\.model: expected .* with {what} of its own"),
        ):
            compare_circuits(config.comparison, ours, other, 0, progress)


@pytest.mark.parametrize("changes", [{"comparison": ITSELF}, {"validation__dark_matter": True}])
def test_the_graph_of_a_prompt_has_neither(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"found graph\.scope=prompt; set comparison=null"):
        tiny_extract(Path("a"), graph__scope="prompt", graph__prompt="0 1", **changes)


def test_prompts_that_measure_do_not_match() -> None:
    prompts = random_prompts(n=6)
    kept = _without(prompts, [prompts[torch.tensor([4])], prompts[torch.tensor([0, 2])]])
    assert torch.equal(kept.tokens, prompts.tokens[[1, 3, 5]])
