"""What a job returns to a sweeper, and a search by Optuna."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import CompactHydraException
from omegaconf import DictConfig

from hagd.cli.extract import OBJECTIVES
from hagd.cli.job import objective
from hagd.cli.paths import conf_dir
from tests.cli.jobs import run_command, run_here, tiny_overrides


def test_the_metric_that_is_returned() -> None:
    metrics = {"selection.preservation": 0.5, "circuit.nodes": 8.0}
    assert objective(metrics, None, OBJECTIVES) == 0.5
    assert objective(metrics, "circuit.nodes", OBJECTIVES) == 8.0
    assert objective({"graph.replacement": 0.7}, None, OBJECTIVES) == 0.7
    assert math.isnan(objective({}, None, OBJECTIVES))


@pytest.mark.usefixtures("undrawn")
def test_a_metric_that_does_not_exist_is_named(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_here(tmp_path, *tiny_overrides(tiny_runs), "optimized_metric=selection.preservatio")
    shown = capsys.readouterr().err
    assert "optimized_metric: expected a key of metrics.json, found selection.preservatio; did you mean" in shown
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    parts = json.loads((tmp_path / "manifest.json").read_text())
    assert 0 <= metrics["selection.preservation"] <= 1.5 and "search" in parts["stages"]


def test_the_search_composes() -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = compose("extract", ["hparams_search=optuna"], return_hydra_config=True)
    assert composed.optimized_metric == "selection.preservation"
    sweeper = composed.hydra.sweeper
    assert sweeper._target_.endswith(".OptunaSweeper") and sweeper.direction == "maximize"
    assert sweeper.sampler._target_ == "optuna.samplers.TPESampler" and sweeper.sampler.seed == 0
    for key, space in sweeper.params.items():
        for value in space.removeprefix("choice(").removesuffix(")").split(", "):
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                compose("extract", [f"{key}={value}"])


@pytest.mark.filterwarnings("ignore:Deprecated API features")  # SQLAlchemy, of Optuna
def test_a_failed_job_does_not_end_the_search(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    asked: list[int] = []

    def job(composed: DictConfig) -> float:
        asked.append(composed.transcoder.k)
        if len(asked) == 1:
            raise CompactHydraException("too large")
        return 0.5

    chosen = ["hparams_search=optuna", "hydra.sweeper.n_trials=3", f"paths.runs={tmp_path}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun("extract", job, chosen, with_log_configuration=False)
    assert len(asked) == 3
    (found,) = tmp_path.rglob("optimization_results.yaml")
    assert yaml.safe_load(found.read_text())["best_value"] == 0.5


@pytest.mark.slow
def test_a_search_finds_the_best_and_goes_on_where_it_was(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    settings = [override for override in tiny_overrides(tmp_path) if not override.startswith("search.n_nodes=")]
    space = ["search.n_nodes=choice(4,8,16)", "search.loss=both"]  # all other keys of the space are fixed by settings
    chosen = ["hparams_search=optuna", *space, "optimized_metric=circuit.nodes", "hydra.sweeper.n_trials=4"]
    first, second = (run_command(tmp_path, "-m", *settings, *chosen) for _ in range(2))
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "4 of 4 jobs done, 4 of them reused" in second.stdout
    results = [yaml.safe_load(file.read_text()) for file in sorted(tmp_path.rglob("optimization_results.yaml"))]
    jobs = json.loads(next((tmp_path / "sweeps").iterdir()).joinpath("sweep.json").read_text())
    best = max(job["figures"]["circuit.nodes"] for job in jobs)
    assert len(results) == 2 and results[0] == results[1]
    assert results[0]["best_value"] == best == results[0]["best_params"]["search.n_nodes"]
