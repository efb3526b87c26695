"""What an extraction leaves in Weights & Biases, read back from an offline run."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hagd.errors import ConfigError
from hagd.pipeline.extraction import run_extraction
from hagd.tracking.read_back import LoggedRun, offline_runs, read_run
from tests.builders import tiny_extract


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder of one extraction that was tracked from the training of its model on, in the group `sweep`."""
    runs = tmp_path_factory.mktemp("tracked")
    config = tiny_extract(runs, tracking__mode="offline", tracking__tags=["tiny"])
    run_extraction(config, runs / "run", "sweep", Console(quiet=True))
    return runs


@pytest.fixture(scope="module")
def logged(folder: Path) -> LoggedRun:
    (run,) = offline_runs(folder)
    return read_run(run)


def test_configuration_and_state(folder: Path, logged: LoggedRun) -> None:
    assert (logged.name, logged.state, logged.exit_code) == ("tiny-sorting-0", "finished", 0)
    config = tiny_extract(folder, tracking__mode="offline", tracking__tags=["tiny"]).model_dump(mode="json")
    assert {key: logged.config[key] for key in config} == config


def test_summary_holds_every_metric(folder: Path, logged: LoggedRun) -> None:
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert {key: logged.summary[key] for key in metrics} == pytest.approx(metrics)


def test_tables(folder: Path, logged: LoggedRun) -> None:
    tables = {"search", "curves", "reconstruction", "fvu by slot", "feature density", "hierarchy"}
    assert set(logged.tables) == tables
    assert [row[0] for row in logged.tables["search"].rows] == ["scorer", "elimination", "gates", "pruning"]
    assert len(logged.tables["curves"].rows) == 4 * 3  # methods × sizes
    assert [row[0] for row in logged.tables["reconstruction"].rows] == [0, 1]
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert len(logged.tables["hierarchy"].rows) == metrics["hierarchy.levels"]


def test_report_figures_and_artifacts(folder: Path, logged: LoggedRun) -> None:
    assert set(logged.media) == {"report", "figures/faithfulness", "figures/circuit", "figures/reconstruction"}
    assert "<html" in logged.media["report"].read_text()[:300]
    kinds = {name.rpartition("-")[0]: paths for name, paths in logged.artifacts.items()}
    assert kinds == {"circuit": ("circuit.json",), "report": ("report.html",)}


def test_training_curves_of_both_trainings(logged: LoggedRun) -> None:
    named = {name for item in logged.history for name in item}
    assert {"lm/loss", "lm/accuracy", "transcoder/loss", "transcoder/fvu"} <= named


def test_a_failed_extraction_is_a_failed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_extract(tmp_path, tracking__mode="offline", task__n_symbols=3)
    with pytest.raises(ValueError, match="distinct prompts wanted"):
        run_extraction(config, tmp_path / "run", None, Console(quiet=True))
    (run,) = offline_runs(tmp_path)
    assert read_run(run).exit_code == 1
    assert "Traceback" not in capsys.readouterr().err  # the message alone is for the user
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_the_terminal_names_stages_headline_and_folder(tiny_runs: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    run_extraction(tiny_extract(tiny_runs), tmp_path, None, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "A circuit of 8 nodes preserves" in text and f"results: {tmp_path}" in text
    assert "transcoders" in text and "reused" in text


def test_a_scorer_that_is_missing_is_noticed_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.scorer"):
        run_extraction(tiny_extract(tmp_path, search__scorer="nowhere"), tmp_path / "run", None, Console(quiet=True))
    assert not (tmp_path / "artifacts").exists()
