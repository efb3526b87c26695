"""What an extraction leaves in Weights & Biases, read back from an offline run."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from hagd.errors import ConfigError
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.stage_runs import StageRuns
from hagd.tracking.sweep_job import SweepJob
from tests.builders import tiny_extract, tiny_settings
from tests.tracking.read_back import LoggedRun, offline_runs, read_run

BRIEF = {"tracking__mode": "offline", "task__training__steps": 40, "transcoder__steps": 15}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs folder of one extraction that was tracked from the training of its model on, in the group `sweep`."""
    runs = tmp_path_factory.mktemp("tracked")
    config = tiny_extract(runs, tracking__tags=["tiny"], **BRIEF)
    run_extraction(config, runs / "run", SweepJob("sweep", ("seed=0",)), Console(quiet=True))
    return runs


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, LoggedRun]:
    """Name → run: that of the job and those of its stages."""
    read = [read_run(run) for run in offline_runs(folder)]
    return {run.name: run for run in read}


@pytest.fixture(scope="module")
def logged(runs: dict[str, LoggedRun]) -> LoggedRun:
    return runs["tiny-sorting-0"]


def test_configuration_and_state(folder: Path, logged: LoggedRun) -> None:
    assert (logged.name, logged.state, logged.exit_code) == ("tiny-sorting-0", "finished", 0)
    config = tiny_extract(folder, tracking__tags=["tiny"], **BRIEF).model_dump(mode="json")
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


STAGES = ("lm", "transcoders", "graph", "hierarchy", "search", "validation")


def test_every_stage_is_a_run_with_its_result(folder: Path, runs: dict[str, LoggedRun]) -> None:
    assert set(runs) == {"tiny-sorting-0", *(f"{stage}-tiny-sorting-0" for stage in STAGES)}
    stages = json.loads((folder / "run" / "manifest.json").read_text())["stages"]
    types = {"lm": "model", "search": "circuit"}
    for stage in STAGES:
        run, key = runs[f"{stage}-tiny-sorting-0"], stages[stage]["key"]
        assert (run.state, run.config["stage_key"], run.config["seed"]) == ("finished", key, 0)
        assert run.summary[f"{stage}.seconds"] == pytest.approx(stages[stage]["seconds"])
        files = ("meta.json", "record.json", "tensors.safetensors")
        assert set(run.artifacts) == {f"{types.get(stage, stage)}-{key}"} and set(*run.artifacts.values()) <= set(files)


@pytest.mark.slow
def test_stages_of_a_compared_model_are_runs_too(tiny_runs: Path, tmp_path: Path) -> None:
    other = {"model": tiny_settings(tiny_runs)["model"], "seed_offset": 7, "n_null": 5, "n_bootstrap": 10}
    config = tiny_extract(tiny_runs, tracking__mode="offline", comparison=other)
    run_extraction(config, tmp_path / "run", SweepJob("compared"), Console(quiet=True))
    runs = {run.name: run for run in map(read_run, offline_runs(tiny_runs))}
    made = {stage: runs[f"{stage}-tiny-sorting-7"] for stage in ("lm", "transcoders", "graph", "search")}
    assert all(run.config["seed"] == 7 for run in made.values())
    comparison = runs["comparison-tiny-sorting-0"]
    assert set(made["search"].artifacts) < set(comparison.used)
    lines = (tmp_path / "run" / "training" / "lm" / "metrics.csv").read_text().splitlines()
    assert len(lines) > 1, "curves of the compared model"


def test_installed_packages_are_listed_once(folder: Path, runs: dict[str, LoggedRun]) -> None:
    listed = {run.parents[1] for run in (folder / "wandb").glob("offline-run-*/files/requirements.txt")}
    assert [read_run(run).name for run in listed] == ["tiny-sorting-0"] and len(runs) > 1


def test_lineage_leads_from_transcoders_to_the_circuit(folder: Path, runs: dict[str, LoggedRun]) -> None:
    made = {stage: next(iter(runs[f"{stage}-tiny-sorting-0"].artifacts)) for stage in STAGES}
    used = {stage: set(runs[f"{stage}-tiny-sorting-0"].used) for stage in STAGES}
    assert used["lm"] == set() and used["transcoders"] == {made["lm"]}
    assert used["graph"] == {made["lm"], made["transcoders"]}
    assert used["search"] == {made[stage] for stage in ("lm", "transcoders", "graph", "hierarchy")}
    assert used["validation"] == {made[stage] for stage in ("lm", "transcoders", "graph", "search")}
    assert set(runs["tiny-sorting-0"].used) == set(made.values())


def test_curves_are_in_the_run_folder_too(folder: Path, runs: dict[str, LoggedRun]) -> None:
    for stage, metric in (("lm", "lm/loss"), ("transcoders", "transcoder/loss")):
        lines = list(csv.DictReader((folder / "run" / "training" / stage / "metrics.csv").read_text().splitlines()))
        logged = [item[metric] for item in runs[f"{stage}-tiny-sorting-0"].history if metric in item]
        assert [float(line[metric]) for line in lines if line[metric]] == pytest.approx(logged)


def test_curves_for_tensorboard(tiny_runs: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_extract(tiny_runs, tracking__tensorboard=True, seed=5)
    loggers = StageRuns(config, "group", tmp_path).loggers("lm", None)
    for logger in loggers:
        logger.log_metrics({"lm/loss": 0.5}, step=3)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "training" / "lm"))
    events.Reload()
    assert [(each.step, each.value) for each in events.Scalars("lm/loss")] == [(3, 0.5)]
    assert len(loggers) == 2 and "lm-1" in str(StageRuns(config, "group", tmp_path).loggers("lm", None)[0].log_dir)


def test_stages_count_their_own_steps(runs: dict[str, LoggedRun]) -> None:
    named = {name: {key for item in run.history for key in item} for name, run in runs.items()}
    assert {"lm/loss", "lm/accuracy"} <= named["lm-tiny-sorting-0"]
    assert {"transcoder/loss", "transcoder/fvu"} <= named["transcoders-tiny-sorting-0"]
    steps = [(item["step"], item["search/evaluations"]) for item in runs["search-tiny-sorting-0"].history]
    parts = runs["tiny-sorting-0"].tables["search"].rows
    assert [step for step, _ in steps] == list(range(len(parts)))
    assert steps[-1][1] == pytest.approx(runs["tiny-sorting-0"].summary["search.evaluations"], abs=1)
    levels = [item["step"] for item in runs["hierarchy-tiny-sorting-0"].history]
    assert levels == list(range(1, len(runs["tiny-sorting-0"].tables["hierarchy"].rows) + 1))


@pytest.mark.usefixtures("undrawn")
def test_a_stage_that_is_there_has_no_second_run(folder: Path) -> None:
    before = len(offline_runs(folder))
    run_extraction(tiny_extract(folder, **BRIEF), folder / "again", SweepJob("sweep"), Console(quiet=True))
    assert len(offline_runs(folder)) == before + 1


@pytest.mark.usefixtures("undrawn")
def test_a_damaged_result_is_made_again_in_a_run_of_its_own(folder: Path) -> None:
    key = json.loads((folder / "run" / "manifest.json").read_text())["stages"]["hierarchy"]["key"]
    (folder / "artifacts" / "hierarchy" / key / "record.json").write_text("{")
    before = set(offline_runs(folder))
    run_extraction(tiny_extract(folder, **BRIEF), folder / "third", SweepJob("sweep"), Console(quiet=True))
    new = {read_run(run).name for run in set(offline_runs(folder)) - before}
    assert new == {"tiny-sorting-0", "hierarchy-tiny-sorting-0"}


def test_a_failed_extraction_is_a_failed_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_extract(tmp_path, tracking__mode="offline", task__n_symbols=3)
    with pytest.raises(ValueError, match="distinct prompts wanted"):
        run_extraction(config, tmp_path / "run", None, Console(quiet=True))
    (run,) = offline_runs(tmp_path)
    assert read_run(run).exit_code == 1
    assert "Traceback" not in capsys.readouterr().err  # the message alone is for the user
    assert not (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_terminal_names_stages_headline_and_folder(tiny_runs: Path, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=160)
    folder = tmp_path / "run[a]"
    run_extraction(tiny_extract(tiny_runs), folder, None, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "A circuit of 8 nodes preserves" in text and f"results: {folder}\n" in text
    assert "transcoders" in text and "reused" in text


def test_a_scorer_that_is_missing_is_noticed_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.scorer"):
        run_extraction(tiny_extract(tmp_path, search__scorer="nowhere"), tmp_path / "run", None, Console(quiet=True))
    assert not (tmp_path / "artifacts").exists()


def test_a_folder_with_something_else_is_no_scorer_and_stays(tiny_runs: Path, tmp_path: Path) -> None:
    folder = next((tiny_runs / "artifacts" / "transcoders").iterdir())
    with pytest.raises(ConfigError, match=r"^search\.scorer: .* found a TranscoderSet.*stage=gnn$") as error:
        run_extraction(tiny_extract(tmp_path, search__scorer=str(folder)), tmp_path / "run", None, Console(quiet=True))
    assert "delete" not in str(error.value) and not (tmp_path / "artifacts").exists()
