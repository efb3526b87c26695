"""A job of a sweep knows what tells it from the others; its W&B run is named after that."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from hagd.cli.paths import conf_dir
from hagd.cli.sweep_jobs import swept_overrides
from hagd.tracking.sweep_job import SweepJob


def swept(*overrides: str) -> list[tuple[str, ...]]:
    """Of every job of a multirun."""
    found: list[tuple[str, ...]] = []

    def job(_: DictConfig) -> float:
        found.append(swept_overrides(HydraConfig.get()))
        return 0.5

    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        hydra.multirun("extract", job, list(overrides), with_log_configuration=False)
    return found


def test_what_all_jobs_share_is_left_out(tmp_path: Path) -> None:
    found = swept(f"paths.runs={tmp_path}", "task=sorting", "hierarchy.branching=2,4", "seed=range(0,2)", "+x='a,b'")
    assert found == [(f"hierarchy.branching={b}", f"seed={seed}") for b in (2, 4) for seed in (0, 1)]


@pytest.mark.parametrize(
    ("experiment", "key", "n_jobs"),
    [
        (("quick/scaling", "graph.n_max=250"), "model.d_model", 4),
        pytest.param(("quick/branching",), "hierarchy.branching", 8, marks=pytest.mark.slow),
    ],
)
def test_keys_of_an_experiment_that_sweeps(experiment: tuple[str, ...], key: str, n_jobs: int, tmp_path: Path) -> None:
    name, *settings = experiment
    found = swept(f"experiment={name}", *settings, "seed=0,1", f"paths.runs={tmp_path}")
    assert len(found) == n_jobs and len(set(found)) == len(found)
    assert {part.partition("=")[0] for job in found for part in job} >= {key, "seed"}


@pytest.mark.filterwarnings("ignore:Deprecated API features")  # SQLAlchemy, of Optuna
def test_keys_that_a_sweeper_chooses(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    found = swept("hparams_search=optuna", "hydra.sweeper.n_trials=2", f"paths.runs={tmp_path}", "seed=3")
    assert len(found) == 2 and all(job and "seed=3" not in job for job in found)


def test_the_name_has_model_and_seed_once() -> None:
    of_sweep = SweepJob("s", ("model=gpt2_mini", "seed=1", "task=parity", "search.n_nodes=8"))
    assert of_sweep.name("gpt2_mini-parity-1") == "gpt2_mini-parity-1 task=parity search.n_nodes=8"
    assert SweepJob("s").name("a") == "a"
