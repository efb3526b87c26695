"""A real sweep of `extract.py`."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException

from tests.cli.jobs import command, environment, run_command, run_here, tiny_overrides
from tests.cli.test_interruption import results
from tests.tracking.read_back import offline_runs, read_run

pytestmark = pytest.mark.usefixtures("undrawn")


def jobs_of(runs: list[Path]) -> list[str]:
    """Names of the runs of whole jobs, without those of single stages."""
    return [name for name in (read_run(run).name for run in runs) if name.startswith("tiny-sorting-0")]


def test_a_job_of_a_sweep_is_not_repeated(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*tiny_overrides(tiny_runs), "validation.n_bootstrap=51"]  # a job that no other test has finished
    first = run_here(tmp_path / "0", *settings, mode="MULTIRUN")
    capsys.readouterr()
    monkeypatch.setattr("hagd.pipeline.extraction.run_extraction", lambda *_: pytest.fail("ran again"))
    again = run_here(tmp_path / "1", *settings, mode="MULTIRUN")
    assert again == pytest.approx(first)
    assert capsys.readouterr().out == f"finished before: {tmp_path.resolve() / '0'}\n"
    assert [file.name for file in (tmp_path / "1").iterdir()] == ["reused.json"]


RESULTS = ("manifest.json", "metrics.json", "report.html", "reused.json", "stopped.json", "tracking.json")


def left(folder: Path) -> list[str]:
    """What sweeps and tables read of a job."""
    return [name for name in RESULTS if (folder / name).is_file()]


def test_a_job_that_gets_the_folder_of_another_one_leaves_nothing_of_it(tiny_runs: Path, tmp_path: Path) -> None:
    settings, folder = tiny_overrides(tiny_runs), tmp_path / "run"
    run_here(folder, *settings)
    (folder / "tracking.json").write_text('{"id": "i", "folder": "../wandb/offline-i"}')
    with pytest.raises(SystemExit):
        run_here(folder, *settings, "search.n_nodes=6", "search.memory_limit_mb=5")
    assert left(folder) == ["stopped.json"]
    with pytest.raises(SystemExit):
        run_here(folder, *settings, "search.scorer=/missing")
    assert left(folder) == []
    run_here(folder, *settings)
    assert left(folder) == ["manifest.json", "metrics.json", "report.html"]
    with pytest.raises(SystemExit):
        run_here(folder, *settings, "hierarchy.branching=1")
    assert left(folder) == ["manifest.json", "metrics.json", "report.html"], "a mistyped command costs nothing"
    with pytest.raises(CompactHydraException):
        run_here(folder, *settings, "hierarchy.branching=1", mode="MULTIRUN")
    assert left(folder) == []


def test_a_repeated_job_that_is_interrupted_keeps_what_it_had(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, folder = [*tiny_overrides(tiny_runs), "validation.n_bootstrap=55"], tmp_path / "run"
    run_here(folder, *settings)
    before = left(folder)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hagd.pipeline.extraction.run_extraction", interrupted)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_here(folder, *settings)
    assert left(folder) == before == ["manifest.json", "metrics.json", "report.html"]


@pytest.mark.slow
def test_a_sweep_in_the_folder_of_another_one_takes_its_place(tiny_runs: Path, tmp_path: Path) -> None:
    """The second has the jobs of the first in another order: none may refer to a folder that a later one gets."""
    jobs = [[*tiny_overrides(tiny_runs), f"validation.n_bootstrap={n}"] for n in (52, 53)]
    found = [run_here(tmp_path / str(i), *job, mode="MULTIRUN") for i, job in enumerate(jobs)]
    again = [run_here(tmp_path / str(i), *job, mode="MULTIRUN") for i, job in enumerate(reversed(jobs))]
    assert [results(each) for each in again] == [results(each) for each in reversed(found)]
    for i, metrics in enumerate(again):
        assert left(tmp_path / str(i)) == ["manifest.json", "metrics.json", "report.html"]
        assert results(json.loads((tmp_path / str(i) / "metrics.json").read_text())) == results(metrics)


def test_the_same_sweep_again_in_its_folder_keeps_its_results(
    tiny_runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = [*tiny_overrides(tiny_runs), "validation.n_bootstrap=54"]
    run_here(tmp_path / "0", *settings, mode="MULTIRUN")
    before = (tmp_path / "0" / "metrics.json").stat().st_mtime_ns
    capsys.readouterr()
    run_here(tmp_path / "0", *settings, mode="MULTIRUN")
    assert capsys.readouterr().out == f"finished before: {tmp_path.resolve() / '0'}\n"
    assert (tmp_path / "0" / "metrics.json").stat().st_mtime_ns == before


def test_a_process_that_helps_with_trainings_removes_nothing(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tracking.json").write_text('{"id": "i"}')
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as stop:
        run_here(tmp_path, *tiny_overrides(tiny_runs))
    assert stop.value.code == 0 and left(tmp_path) == ["tracking.json"]


@pytest.mark.slow
def test_a_sweep_with_a_failing_job(tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tmp_path), "tracking=offline", "search.n_nodes=4000,8"]
    done = run_command(tmp_path, "-m", *overrides)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "1 of 2 jobs done" in done.stdout
    assert "search.n_nodes: expected at most" in done.stdout
    (sweep,) = (tmp_path / "sweeps").iterdir()
    failed, succeeded = json.loads((sweep / "sweep.json").read_text())
    assert failed["status"] == "failed" and failed["error"].startswith("search.n_nodes: expected at most")
    assert succeeded["status"] == "done" and succeeded["figures"]["circuit.nodes"] == 8
    assert (sweep / "1" / "report.html").is_file() and not (sweep / "0" / "metrics.json").exists()
    manifest = json.loads((sweep / "1" / "manifest.json").read_text())
    assert manifest["stages"]["lm"]["reused"] and not manifest["stages"]["search"]["reused"]
    runs = offline_runs(tmp_path)
    assert sorted(jobs_of(runs)) == [f"tiny-sorting-0 search.n_nodes={n}" for n in (4000, 8)]
    for run in runs:  # W&B's own reader does not show the group
        assert sweep.name.encode() in next(run.glob("*.wandb")).read_bytes()


@pytest.mark.slow
def test_a_rerun_retries_what_failed_and_nothing_else(tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tmp_path), "tracking=offline", "search.n_nodes=4000,8"]
    run_command(tmp_path, "-m", *overrides)
    again = run_command(tmp_path, "-m", *overrides)
    assert again.returncode == 1 and "1 of 2 jobs done, 1 of them reused" in again.stdout
    first, second = sorted((tmp_path / "sweeps").iterdir())
    failed, reused = json.loads((second / "sweep.json").read_text())
    assert failed["status"] == "failed" and failed["error"].startswith("search.n_nodes: expected at most")
    assert reused["status"] == "reused"
    assert Path(reused["run"]).is_dir() and Path(failed["run"]).is_dir()
    assert reused["run"] == json.loads((first / "sweep.json").read_text())[1]["run"]
    assert len(jobs_of(offline_runs(tmp_path))) == 3, "one for the job that was not repeated, one for every other try"


@pytest.mark.slow
def test_an_interrupted_sweep_lists_the_jobs_that_never_started(tmp_path: Path) -> None:
    overrides = [*tiny_overrides(tmp_path), "seed=0,1,2"]
    process = subprocess.Popen(
        command("-m", *overrides), cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "jobs").glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    shown, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "1 of 3 jobs done" in shown
    (sweep,) = (tmp_path / "sweeps").iterdir()
    assert [job["status"] for job in json.loads((sweep / "sweep.json").read_text())] in (
        ["done", "unfinished", "not started"],
        ["done", "not started", "not started"],
    )
