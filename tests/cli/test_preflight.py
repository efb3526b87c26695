"""Folders for results that are none: one line before Hydra makes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.jobs import run_command


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for mode in ([], ["-m", "seed=1,2"]):
        done = run_command(tmp_path, *mode, f"paths.runs={tmp_path / 'file' / 'runs'}")
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert done.stderr.startswith("error: paths.runs: expected a folder that can be written, found ")


@pytest.mark.parametrize("arguments", [["hydra.run.dir=file/job"], ["hydra.sweep.dir=file/jobs", "-m"]])
def test_a_folder_of_a_job_that_cannot_be_written(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "file").write_text("")
    done = run_command(tmp_path, *arguments)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    key = arguments[0].partition("=")[0]
    assert done.stderr.startswith(f"error: {key}: expected a folder that can be written, found file/job")


@pytest.mark.parametrize("given", ["paths.runs=null", "paths.runs=", "paths.runs=7", "paths=null", "paths.runs=${x}"])
def test_a_runs_folder_without_a_name_leaves_nothing_behind(tmp_path: Path, given: str) -> None:
    done = run_command(tmp_path, given)
    assert done.returncode == 1 and done.stderr.startswith("error: paths.runs: expected the name of a folder, found")
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
