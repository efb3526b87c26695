"""`train.py`: each stage trains, stores what `extract.py` then uses, and trains nothing twice."""

from __future__ import annotations

import io
import json
import math
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from hagd.artifacts.codec import load_record
from hagd.errors import ConfigError
from hagd.pipeline import training
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.start import refuse_untrainable_dictionaries
from hagd.pipeline.training import run_training
from hagd.search.scorer.records import TrainedScorer
from tests.builders import tiny_extract, tiny_settings, tiny_train
from tests.tracking.read_back import offline_runs, read_run

QUIET = Console(quiet=True)


def no_sections(group: str, name: str) -> dict[str, Any]:
    raise AssertionError("only the scorer's training reads other configurations")


def sections(group: str, name: str) -> dict[str, Any]:
    """The tiny model, and its task with `name` symbols, trained briefly."""
    settings = tiny_settings(Path())
    if group == "model":
        return settings["model"]
    return {**settings["task"], "n_symbols": int(name), "training": {**settings["task"]["training"], "steps": 30}}


def manifest(folder: Path) -> dict[str, Any]:
    stages: dict[str, Any] = json.loads((folder / "manifest.json").read_text())["stages"]
    return stages


def test_stage_lm_trains_the_model_that_extraction_uses(tmp_path: Path) -> None:
    config = tiny_train(tmp_path, stage="lm", task__training__steps=12)
    folder, console = tmp_path / "run[a]", Console(file=io.StringIO())
    metrics = run_training(config, no_sections, folder, None, console)
    assert metrics["objective"] == metrics["model.accuracy"]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    assert set(manifest(folder)) == {"task", "lm"}
    assert f"results: {folder}\n" in console.file.getvalue()  # type: ignore[attr-defined]
    extraction = Pipeline(tiny_extract(tmp_path, task__training__steps=12), QUIET)
    extraction.get("lm")
    assert extraction.used["lm"].reused
    run_training(config, no_sections, tmp_path / "again", None, QUIET)
    assert manifest(tmp_path / "again")["lm"]["reused"]


def test_stage_transcoder_measures_the_dictionaries(tiny_runs: Path, tmp_path: Path) -> None:
    config = tiny_train(tiny_runs, stage="transcoder", transcoder__k=3)
    metrics = run_training(config, no_sections, tmp_path, None, QUIET)
    assert metrics["objective"] == -metrics["transcoder.fvu"] and metrics["transcoder.l0"] <= 3
    stored = json.loads((tmp_path / "metrics.json").read_text())
    wanted = ("fvu", "l0", "dead", "dense", "near_duplicates", "loss_recovered", "kl")
    assert stored == metrics
    assert {f"transcoder.layer{i}.{name}" for i in (0, 1) for name in wanted} <= stored.keys()
    assert {"transcoder.layer0.prediction_r2", "transcoder.kl_all", "transcoder.loss_recovered_all"} <= stored.keys()
    assert sum(key.startswith("transcoder.layer1.fvu_by_slot.") for key in stored) > 1
    assert stored["time.transcoder_tokens_per_second"] > 0 and 0 <= stored["time.transcoder_waiting"] <= 1
    assert stored["memory.peak_mb"] > 0 and stored["time.total_s"] > 0
    assert manifest(tmp_path)["lm"]["reused"] and not manifest(tmp_path)["transcoders"]["reused"]


@pytest.mark.skipif(find_spec("torchao") is not None, reason="torchao is installed")
def test_an_optimiser_without_its_package_is_refused_where_it_would_train(tmp_path: Path) -> None:
    asked = {"transcoder__optimiser": "adam8bit", "task__training__steps": 2}
    with pytest.raises(ConfigError, match=r"transcoder\.optimiser=adam8bit: expected the package torchao"):
        run_training(tiny_train(tmp_path, stage="transcoder", **asked), no_sections, tmp_path / "run", None, QUIET)
    gnn = tiny_train(tmp_path, stage="gnn", gnn__tasks=["7"], gnn__models=["tiny"], gnn__seeds=[0], **asked)
    with pytest.raises(ConfigError, match=r"transcoder\.optimiser=adam8bit: expected the package torchao"):
        run_training(gnn, sections, tmp_path / "run", None, QUIET)
    assert not (tmp_path / "artifacts").exists()
    run_training(tiny_train(tmp_path, stage="lm", **asked), no_sections, tmp_path / "run", None, QUIET)
    refuse_untrainable_dictionaries(Pipeline(tiny_extract(tmp_path, transcoder__path="elsewhere", **asked), QUIET))
    trained = Pipeline(tiny_extract(tmp_path, **asked), QUIET)
    stored = tmp_path / "artifacts" / "transcoders" / trained.key("transcoders") / "meta.json"
    stored.parent.mkdir(parents=True)
    stored.write_text("{}")
    refuse_untrainable_dictionaries(trained)


def test_stage_lm_refuses_pretrained_models(tmp_path: Path) -> None:
    model = {"kind": "pretrained", "name": "x", "path": "nowhere"}
    config = tiny_train(tmp_path, stage="lm", model=model, task={"name": "ioi"})
    with pytest.raises(ConfigError, match=r"stage=lm: expected a mini model, found model\.kind=pretrained"):
        run_training(config, no_sections, tmp_path / "run", None, QUIET)


GNN = {
    "edges": True,
    "models": ["tiny"],
    "tasks": ["12", "13"],
    "seeds": [100, 101],
    "epochs": 2,
    "hidden": 8,
    "heads": 2,
}


BRIEF = {"transcoder__steps": 10, "search__gates": False, "search__pruning": False}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    """A scorer meta-trained on four circuits, two tasks and two seeds, the last held out."""
    runs = tmp_path_factory.mktemp("scorer")
    config = tiny_train(runs, stage="gnn", gnn=GNN, tracking__mode="offline", **BRIEF)
    return runs, run_training(config, sections, runs / "run", None, QUIET)


def test_stage_gnn_trains_a_scorer_on_other_circuits(trained: tuple[Path, dict[str, float]]) -> None:
    runs, metrics = trained
    assert metrics["graphs"] == 4 and metrics["objective"] == metrics["scorer.correlation"]
    assert -1 <= metrics["scorer.correlation"] <= 1 and math.isfinite(metrics["scorer.importance_correlation"])
    scorer = load_record(TrainedScorer, runs / "artifacts" / "scorer" / manifest(runs / "run")["scorer"]["key"])
    assert scorer.trained_on == ("tiny-sorting-100", "tiny-sorting-100", "tiny-sorting-101")
    assert len(list((runs / "artifacts" / "search").iterdir())) == 4
    logged = {run.name: run for run in map(read_run, offline_runs(runs))}
    assert {f"{stage}-tiny-sorting-{seed}" for stage in ("lm", "search") for seed in (100, 101)} < set(logged)
    scorer_run = logged["gnn-tiny-sorting-0"]
    assert scorer_run.summary["scorer.correlation"] == pytest.approx(metrics["scorer.correlation"])
    assert any("gnn/loss" in item for item in scorer_run.history)


@pytest.mark.usefixtures("undrawn")
def test_an_extraction_uses_the_scorer(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    runs, _ = trained
    options = {"search__traversal": False, "task__training__steps": 60, **BRIEF}
    (folder,) = (file.parent for file in (runs / "artifacts" / "scorer").glob("*/record.json"))
    guided = tiny_extract(runs, search__scorer=str(folder), **options)
    run_extraction(guided, tmp_path / "guided", None, QUIET)
    pipeline = Pipeline(guided, QUIET)
    result = pipeline.get("search")
    assert pipeline.used["search"].reused
    assert [step.note for step in result.steps if step.name == "scorer"] == ["meta-learned scorer"]
    without = Pipeline(tiny_extract(runs, **options), QUIET)
    assert without.key("search") != pipeline.key("search")
    note = next(step.note for step in without.get("search").steps if step.name == "scorer")
    assert "no meta-learned scorer" in note
    moved = tiny_extract(runs, search__scorer=str(shutil.copytree(folder, tmp_path / "scorer")), **options)
    assert Pipeline(moved, QUIET).key("search") == pipeline.key("search"), "its content counts, not its path"


def test_the_precision_of_its_training_is_part_of_a_scorers_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of pretrained models with given dictionaries do not depend on it, so their keys do not carry it."""
    read: list[str | None] = []

    def stop(stage: str, version: int, config: dict[str, Any], *_: object) -> str:
        read.append(config.get("precision"))
        raise InterruptedError

    monkeypatch.setattr(training, "stage_key", stop)
    for precision in ("32-true", "bf16-mixed"):
        with pytest.raises(InterruptedError):
            config = tiny_train(tmp_path, stage="gnn", gnn=GNN, trainer__precision=precision)
            run_training(config, sections, tmp_path / precision, None, QUIET)
    assert read == [None, "bf16-mixed"]


def test_a_damaged_scorer_is_trained_again(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    shutil.copytree(trained[0] / "artifacts", runs / "artifacts")
    (stored,) = (runs / "artifacts" / "scorer").glob("*/tensors.safetensors")
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1])
    again = run_training(tiny_train(runs, stage="gnn", gnn=GNN, **BRIEF), sections, tmp_path / "again", None, QUIET)
    assert again["objective"] == trained[1]["objective"] and stored.read_bytes() == whole


def test_the_scorer_is_trained_once(trained: tuple[Path, dict[str, float]], tmp_path: Path) -> None:
    runs, metrics = trained
    again = run_training(tiny_train(runs, stage="gnn", gnn=GNN, **BRIEF), sections, tmp_path / "again", None, QUIET)
    assert again == metrics and manifest(tmp_path / "again")["scorer"]["reused"]
    searches = set((runs / "artifacts" / "search").iterdir())
    other = tiny_train(runs, stage="gnn", gnn={**GNN, "edges": False}, **BRIEF)
    run_training(other, sections, tmp_path / "flat", None, QUIET)
    assert not manifest(tmp_path / "flat")["scorer"]["reused"]
    assert set((runs / "artifacts" / "search").iterdir()) == searches  # its graphs were there already
