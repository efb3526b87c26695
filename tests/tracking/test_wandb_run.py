from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hagd.config.run import TrackingConfig
from hagd.errors import ConfigError
from hagd.tracking.wandb_run import Run, tracked_run
from tests.tracking.read_back import LoggedTable, inspect, is_artifact, offline_runs, read_run

PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):  # what the code sets is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def started(directory: Path, mode: str = "offline", **changes: Any) -> Any:
    tracking = TrackingConfig(mode=mode, project="test", tags=("a", "b"))
    options = {"name": "job", "group": "sweep", "job_type": "extract", "config": {"seed": 3, "model": {"k": [1, 2]}}}
    return tracked_run(tracking, **{**options, **changes}, directory=directory, packages=False)


def log_everything(run: Run, folder: Path) -> None:
    (folder / "figure.png").write_bytes(PNG)
    (folder / "report.html").write_text("<p>é</p>")
    (folder / "circuit" / "deep").mkdir(parents=True)
    (folder / "circuit" / "deep" / "record.json").write_text("{}")
    (folder / "circuit" / "meta.json").write_text("{}")
    for step in range(3):
        run.log({"lm/loss": 1.0 / (step + 1)}, step=step)
    for step in range(2):  # a second stage starts to count again
        run.log({"gates/loss": 5.0 - step}, step=step)
    run.log({"stage/seconds": 1.5})
    run.table("circuits", ["size", "preservation"], [(10, 0.5), (20, None), ("all", 1)])
    run.figure("curve", folder / "figure.png")
    run.html("report", folder / "report.html")
    run.artifact("circuit", "circuit", folder / "circuit")
    run.artifact("page", "report", folder / "report.html", {"key": "abc"})
    run.use("graph", "graph", folder / "circuit")
    run.summary({"circuit.nodes": 200, "validation.preservation": 0.91, "text": "é"})


def test_offline_run_reads_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs, media = tmp_path / "runs", tmp_path / "media"
    media.mkdir()
    with started(runs) as run:
        log_everything(run, media)
        run.configure({"model": {"m": 8}})
        folder = run.dir
        assert run.url is None and run.id in str(folder)
    assert capfd.readouterr() == ("", "")
    assert offline_runs(runs) == [folder]
    read = read_run(folder)
    assert (read.name, read.state, read.exit_code) == ("job", "finished", 0)
    assert read.config == {"seed": 3, "model": {"k": [1, 2], "m": 8}}
    assert read.summary["circuit.nodes"] == 200 and read.summary["text"] == "é"
    assert math.isclose(read.summary["validation.preservation"], 0.91)
    assert read.summary["gates/loss"] == 4.0 and read.summary["stage/seconds"] == 1.5
    steps = [(item["step"], item["gates/loss"]) for item in read.history if "gates/loss" in item]
    assert steps == [(0, 5.0), (1, 4.0)]
    assert sum("lm/loss" in item for item in read.history) == 3
    assert read.tables == {"circuits": LoggedTable(("size", "preservation"), ((10, 0.5), (20, None), ("all", 1)))}
    assert read.media["curve"].read_bytes() == PNG and read.media["report"].read_text() == "<p>é</p>"
    assert read.artifacts == {"circuit": ("deep/record.json", "meta.json"), "page": ("report.html",)}
    assert read.used == ("graph",)


def test_of_what_is_too_large_there_are_only_paths_and_checksums(tmp_path: Path) -> None:
    small, large = tmp_path / "small.bin", tmp_path / "large"
    large.mkdir()
    small.write_bytes(b"a" * 2**20)
    for name in ("one", "two"):  # neither is above the limit alone
        (large / name).write_bytes(b"b" * (2**19 + 1))
    tracking = TrackingConfig(mode="offline", upload_mb=1)
    with tracked_run(tracking, name="n", group=None, job_type="t", config={}, directory=tmp_path) as run:
        run.artifact("small", "weights", small)
        run.artifact("large", "weights", large)
        run.use("input", "weights", large)
        folder = run.dir
    assert folder is not None
    referred = {
        record["artifact"]["name"]: [entry.get("ref") for entry in record["artifact"]["manifest"]["contents"]]
        for record in map(json.loads, inspect(folder).splitlines())
        if is_artifact(record)
    }
    paths = [(large / name).as_uri() for name in ("one", "two")]
    assert referred == {"small": [None], "large": paths, "input": paths}


def test_failed_job_is_a_failed_run(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="broken"), started(tmp_path):
        raise RuntimeError("broken")
    assert read_run(offline_runs(tmp_path)[0]).exit_code == 1


def test_runs_of_one_process_stay_apart(tmp_path: Path) -> None:
    for number in range(2):
        with started(tmp_path, name=f"job{number}") as run:
            run.summary({"number": number})
    read = [read_run(folder) for folder in offline_runs(tmp_path)]
    assert {run.name: run.summary["number"] for run in read} == {"job0": 0, "job1": 1}


def test_disabled_takes_every_call_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    media, runs = tmp_path / "media", tmp_path / "runs"
    media.mkdir()
    monkeypatch.chdir(tmp_path)
    with started(runs, "disabled") as run:
        log_everything(run, media)
        assert run.url is None and run.dir is None and run.id
    assert list(tmp_path.iterdir()) == [media]
    assert capfd.readouterr() == ("", "")


def test_disabled_does_not_import_wandb() -> None:
    code = """
import sys
from pathlib import Path
from hagd.config.run import TrackingConfig
from hagd.tracking.wandb_run import tracked_run
off = TrackingConfig(mode="disabled")
with tracked_run(off, name="n", group=None, job_type="t", config={}, directory=Path()) as run:
    run.table("circuits", ["size"], [[10]])
print("wandb" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "False\n"


def test_overhead_of_an_offline_run(tmp_path: Path) -> None:
    start = time.perf_counter()
    with started(tmp_path) as run:
        run.log({"loss": 1.0}, step=0)
    assert time.perf_counter() - start < 10  # measured: 1 s; room for a busy machine


@pytest.mark.slow
def test_killed_run_keeps_what_it_logged(tmp_path: Path) -> None:
    code = f"""
import os, time
from pathlib import Path
from hagd.config.run import TrackingConfig
from hagd.tracking.wandb_run import tracked_run
root = Path({str(tmp_path)!r})
with tracked_run(TrackingConfig(), name="n", group=None, job_type="t", config={{}}, directory=root) as run:
    run.log({{"loss": 0.25}}, step=7)
    time.sleep(1.5)
    os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, timeout=60)
    assert done.returncode == -9, done.stderr
    read = read_run(offline_runs(tmp_path)[0])
    assert {"step": 7, "loss": 0.25} in read.history
    assert read.exit_code != 0


def test_online_without_login_names_the_fix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no stored login
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(ConfigError, match=r"tracking\.mode.*tracking\.mode=offline"), started(tmp_path, "online"):
        pytest.fail("started")


@pytest.mark.slow
def test_lightning_logs_into_the_same_run(tmp_path: Path) -> None:
    with started(tmp_path) as run:
        (logger,) = run.lightning_loggers()
        logger.log_metrics({"transcoder/loss": 0.5}, step=10)
        run.log({"gates/loss": 2.0}, step=3)
        logger.log_metrics({"transcoder/loss": 0.25}, step=20)
        logger.finalize("success")
    history = read_run(offline_runs(tmp_path)[0]).history
    assert [item["trainer/global_step"] for item in history if "transcoder/loss" in item] == [10, 20]
    assert [item["step"] for item in history if "gates/loss" in item] == [3]
