"""A sweep does not repeat a job that has finished, and repeats every other one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hagd.config.run import ExtractConfig
from hagd.pipeline.finished import FinishedJob, finished_job, may_be_overwritten, refer_to, remember_finished
from hagd.pipeline.job_key import job_key
from tests.builders import tiny_extract, tiny_train


def finish(runs: Path, name: str = "run", **changes: Any) -> ExtractConfig:
    """A job that has left what every job leaves."""
    config = tiny_extract(runs, **changes)
    folder = runs / name
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_text(json.dumps({"job_key": job_key(config)}))
    (folder / "metrics.json").write_text('{"validation.preservation": 0.5}')
    remember_finished(config, folder)
    return config


def test_a_finished_job_is_found(tmp_path: Path) -> None:
    config = finish(tmp_path)
    found = FinishedJob(job_key(config), tmp_path.resolve() / "run", {"validation.preservation": 0.5})
    assert finished_job(config) == found
    assert finished_job(tiny_extract(tmp_path, trainer__threads=2)) == found, "threads decide no result"


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"transcoder__k": 3}, {"tracking__mode": "offline"}],
    ids=lambda changes: next(iter(changes)),
)
def test_another_job_has_not_finished(tmp_path: Path, changes: dict[str, Any]) -> None:
    finish(tmp_path)
    assert finished_job(tiny_extract(tmp_path, **changes)) is None


def test_runs_that_are_tracked_elsewhere_are_kept_apart(tmp_path: Path) -> None:
    plain, tracked = finish(tmp_path), finish(tmp_path, "tracked", tracking__mode="offline")
    folders = [found.folder.name for found in map(finished_job, (plain, tracked)) if found is not None]
    assert folders == ["run", "tracked"]


def test_results_that_are_gone_are_made_again(tmp_path: Path) -> None:
    config = finish(tmp_path)
    (tmp_path / "run" / "metrics.json").write_text("{")
    assert finished_job(config) is None
    shutil.rmtree(tmp_path / "run")
    assert finished_job(config) is None


def test_a_folder_that_another_job_has_got_holds_the_results_of_that_one(tmp_path: Path) -> None:
    first, second = finish(tmp_path), finish(tmp_path, seed=1)
    assert finished_job(first) is None
    assert finished_job(second) is not None


def test_runs_may_be_moved(tmp_path: Path) -> None:
    (tmp_path / "old").mkdir()
    finish(tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / "new")
    found = finished_job(tiny_extract(tmp_path / "new"))
    assert found is not None and found.folder == tmp_path.resolve() / "new" / "run"


def test_a_plan_leaves_no_marker(tmp_path: Path) -> None:
    config = tiny_extract(tmp_path, mode="plan", graph__scope="prompt", graph__prompt="0 1")
    remember_finished(config, tmp_path)
    assert finished_job(config) is None and not (tmp_path / "jobs").exists()


def test_a_copy_of_dictionaries_that_is_gone_is_made_again(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    config = tiny_train(tmp_path, export__format="hagd", export__path=str(copy))
    (tmp_path / "manifest.json").write_text(json.dumps({"job_key": job_key(config)}))
    (tmp_path / "metrics.json").write_text("{}")
    copy.mkdir()
    remember_finished(config, tmp_path)
    assert finished_job(config) == FinishedJob(job_key(config), tmp_path.resolve(), {})
    copy.rmdir()
    assert finished_job(config) is None


def test_the_folder_of_a_job_that_was_not_repeated_says_where_its_results_are(tmp_path: Path) -> None:
    refer_to(FinishedJob("k", tmp_path / "a" / "0", {}), tmp_path / "b" / "3")
    reused = json.loads((tmp_path / "b" / "3" / "reused.json").read_text())
    assert reused == {"job_key": "k", "folder": "../../a/0"}


@pytest.mark.parametrize(
    ("folder", "lost"),
    [("a/0", False), ("a/9", False), ("a/10", False), ("a/11", True), ("a/x", True), ("b/11", False)],
)
def test_later_jobs_of_a_sweep_get_the_folders_that_an_earlier_sweep_left(
    tmp_path: Path, folder: str, lost: bool
) -> None:
    assert may_be_overwritten(FinishedJob("k", tmp_path.resolve() / folder, {}), tmp_path / "a" / "10") == lost
