from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hagd.cli.sweep_jobs import Job, Status, read_jobs
from hagd.cli.sweep_summary import _label, aggregate, write_summary

ROOT = Path(__file__).resolve().parents[2]

APP = """
import json, os, sys
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from hagd.cli.sweep_end import sweep_ends

@hydra.main(version_base=None, config_path="conf", config_name="app")
def main(config):
    folder = Path(HydraConfig.get().runtime.output_dir)
    if config.x == 2:
        (folder / "error.txt").write_text("task.p: must be at least 2 [found 1]\\nmore")
        raise ValueError("bad")
    if config.x == 3:
        return
    metrics = {"circuit": {"nodes": 10 * config.x}, "validation.preservation": 0.5 + config.x / 100, "other": 1}
    (folder / "metrics.json").write_text(json.dumps(metrics))

with sweep_ends():
    main()
"""

CONFIG = """
x: 0
defaults: [_self_%s]
hydra:
  callbacks:
    summary:
      _target_: hagd.cli.sweep_summary.SweepSummary
  sweep: {dir: sweep, subdir: "${hydra.job.num}"}
"""


def test_a_sweep_over_a_glob_has_a_table(tmp_path: Path) -> None:
    (tmp_path / "conf" / "part").mkdir(parents=True)
    for name, x in (("one", 1), ("two", 3), ("other", 4)):
        (tmp_path / "conf" / "part" / f"{name}.yaml").write_text(f"# @package _global_\nx: {x}\n")
    (tmp_path / "conf" / "app.yaml").write_text(CONFIG % ", {part: null}")
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    command = [sys.executable, "app.py", "-m", "part=glob(*o*, exclude=other)"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "error" not in done.stderr
    jobs = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [(job["overrides"], job["status"]) for job in jobs] == [(["part=one"], "done"), (["part=two"], "unfinished")]


def sweep(folder: Path, launcher: str = "", jobs: int = 12) -> subprocess.CompletedProcess[str]:
    (folder / "conf").mkdir()
    (folder / "conf" / "app.yaml").write_text(CONFIG % launcher)
    (folder / "app.py").write_text(textwrap.dedent(APP))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    values = ",".join(map(str, range(jobs)))
    command = [sys.executable, "app.py", "-m", f"x={values}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def check(folder: Path, done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 1, done.stderr  # one job failed
    jobs = read_jobs(folder / "sweep")
    assert [job.overrides for job in jobs] == [(f"x={number}",) for number in range(12)]
    assert [job.status for job in jobs] == ["done", "done", "failed", "unfinished", *["done"] * 8]
    assert jobs[5].figures == {"circuit.nodes": 50, "validation.preservation": 0.55}
    assert done.stdout.count("10 of 12 jobs done") == 1
    assert "x=2: task.p: must be at least 2 [found 1]\n" in done.stdout
    row = next(line for line in done.stdout.splitlines() if "x=11 " in line)
    assert "110" in row and "0.610" in row
    written = json.loads((folder / "sweep" / "sweep.json").read_text())
    assert written[5]["figures"] == jobs[5].figures and written[2]["error"].startswith("task.p")
    markdown = (folder / "sweep" / "summary.md").read_text().splitlines()
    assert markdown[0] == "10 of 12 jobs done."
    assert markdown[2] == "| job | status | nodes | φ |"
    assert markdown[9] == "| x=5 | done | 50 | 0.550 |"
    assert markdown[-1] == "- `x=2`: task.p: must be at least 2 [found 1]"


def test_summary_of_a_sweep_with_a_failed_job(tmp_path: Path) -> None:
    check(tmp_path, sweep(tmp_path))


def test_summary_of_a_sweep_without_failures_is_printed_once(tmp_path: Path) -> None:
    done = sweep(tmp_path, jobs=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 of 2 jobs done") == 1
    assert "Failed" not in (tmp_path / "sweep" / "summary.md").read_text()


@pytest.mark.slow
def test_summary_with_jobs_in_other_processes(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    check(tmp_path, sweep(tmp_path, ", override hydra/launcher: joblib"))


def started(folder: Path, *overrides: str) -> None:
    """A job of which Hydra has made the folder."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(f"[{', '.join(overrides)}]")


def test_jobs_that_ran_before_and_jobs_that_never_started(tmp_path: Path) -> None:
    for number in range(2):
        started(tmp_path / str(number), f"a.k={number}")
    earlier = tmp_path / "elsewhere" / "7"
    earlier.mkdir(parents=True)
    (earlier / "manifest.json").write_text('{"job_key": "x"}')
    (earlier / "metrics.json").write_text('{"circuit.nodes": 80}')
    (earlier / "tracking.json").write_text('{"id": "abc", "folder": "../../wandb/offline-run-abc"}')
    (tmp_path / "0" / "reused.json").write_text('{"job_key": "x", "folder": "../elsewhere/7"}')
    (tmp_path / "1" / "tracking.json").write_text('{"id": "def", "url": "https://wandb.ai/team/hagd/runs/def"}')
    jobs = read_jobs(tmp_path, [("a.k=0",), ("a.k=1",), ("a.k=2",)])
    assert [job.status for job in jobs] == ["reused", "unfinished", "not started"]
    assert jobs[0].figures == {"circuit.nodes": 80} and jobs[0].run == str(tmp_path / "wandb" / "offline-run-abc")
    write_summary(tmp_path, jobs)
    assert (tmp_path / "summary.md").read_text().splitlines() == [
        "1 of 3 jobs done, 1 of them reused.",
        "",
        "| job | status | nodes | run |",
        "| --- | --- | --- | --- |",
        "| k=0 | reused | 80 | [abc](wandb/offline-run-abc) |",
        "| k=1 | unfinished | – | [def](https://wandb.ai/team/hagd/runs/def) |",
        "| k=2 | not started | – | – |",
    ]


def test_jobs_of_an_earlier_sweep_in_the_same_folder_are_left_out(tmp_path: Path) -> None:
    for number, k in enumerate((7, 1, 7, 2)):  # the new sweep was interrupted in its first job
        started(tmp_path / str(number), f"a.k={k}")
        (tmp_path / str(number) / "metrics.json").write_text('{"circuit.nodes": 80}')
    (tmp_path / "0" / "metrics.json").unlink()
    jobs = read_jobs(tmp_path, [("a.k=7",), ("a.k=8",), ("a.k=2",)])
    assert [(*job.overrides, job.status) for job in jobs] == [
        ("a.k=7", "unfinished"),
        ("a.k=2", "done"),
        ("a.k=8", "not started"),
    ]


def test_results_that_another_job_has_overwritten_are_not_reused(tmp_path: Path) -> None:
    started(tmp_path / "0")
    (tmp_path / "0" / "reused.json").write_text('{"job_key": "x", "folder": "../1"}')
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "manifest.json").write_text('{"job_key": "y"}')
    (tmp_path / "1" / "metrics.json").write_text('{"circuit.nodes": 80}')
    (job,) = read_jobs(tmp_path)
    assert (job.status, job.figures, job.folder) == ("unfinished", {}, str(tmp_path / "0"))


def test_keys_are_shortened_unless_two_would_be_the_same() -> None:
    jobs = [Job("", ("graph.n=1", f"search.n={n}", f"seed={n}"), "done", {}, None) for n in range(2)]
    assert _label(jobs[1], jobs) == "n=1 seed=1"
    jobs.append(Job("", ("graph.n=2", "search.n=0", "seed=0"), "done", {}, None))
    assert _label(jobs[2], jobs) == "graph.n=2 search.n=0 seed=0"


def test_truncated_metrics_are_no_success(tmp_path: Path) -> None:
    started(tmp_path / "0")
    (tmp_path / "0" / "metrics.json").write_text('{"circuit.nodes": 1')
    assert read_jobs(tmp_path)[0].status == "unfinished"


@pytest.mark.parametrize("written", [b"", b"- a.k=1\n- [", b"\xff"])
def test_a_job_killed_while_its_folder_was_made_takes_nobodys_table(tmp_path: Path, written: bytes) -> None:
    started(tmp_path / "0")
    started(tmp_path / "1")
    (tmp_path / "1" / ".hydra" / "overrides.yaml").write_bytes(written)
    assert [job.overrides for job in read_jobs(tmp_path)][1:] == [()]


def test_means_over_seeds() -> None:
    def job(seed: int, k: int, nodes: float, fvu: float, status: Status = "done") -> Job:
        figures = {"circuit.nodes": nodes, "transcoder.fvu": fvu, "time.total_s": 100.0 * seed}
        return Job("", ("task=parity", f"k={k}", f"seed={seed}"), status, figures, None)

    jobs = [job(1, 4, 10, 0.004), job(2, 4, 10, 0.006), job(3, 4, 99, 0.9, "failed"), job(1, 8, 20, 0.5)]
    assert aggregate(jobs) == (
        ["setting", "seeds", "nodes", "FVU", "seconds"],
        [["k=4", "2", "10", "0.005 ± 0.001", "150 ± 71"], ["k=8", "1", "20", "0.500", "100"]],
    )
    assert aggregate(jobs[1:]) is None, "no setting has two seeds"


def test_the_page_links_each_job_to_its_report(tmp_path: Path) -> None:
    figures = {"validation.preservation": 0.9}
    (tmp_path / "0 a").mkdir()
    (tmp_path / "0 a" / "report.html").write_text("")
    done = Job(str(tmp_path / "0 a"), ("seed=0",), "done", figures, None)
    failed = Job(str(tmp_path / "1"), ("seed=1",), "failed", {}, "task.p: too small")
    write_summary(tmp_path, [done, failed])
    page = (tmp_path / "summary.html").read_text()
    assert '<a class="link" href="0%20a/report.html">seed=0</a>' in page and page.count("<a ") == 1
    assert 'data-value="0.9">0.900</td>' in page and "failed: task.p: too small" in page and "1 of 2 jobs done" in page
