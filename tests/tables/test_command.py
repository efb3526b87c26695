"""Two cells of a tiny table, really run: listed, estimated, shown."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from hagd.errors import MemoryLimitError
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.finished import remember_finished
from hagd.pipeline.job_key import job_key
from hagd.tables import definition
from hagd.tables.command import main, narrowed, swept
from hagd.tables.cost import Estimate, estimate, spent, total
from hagd.tables.definition import load_table
from hagd.tables.formats import csv_text, markdown
from hagd.tables.runs import finished_runs, stopped_runs
from hagd.tables.view import CellRuns, match_runs, view
from tests.builders import tiny_extract
from tests.tables.cases import conf_with_tiny, finished, table, with_runs
from tests.tracking.read_back import offline_runs, read_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.usefixtures("undrawn")
def test_two_cells_from_missing_to_shown(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tiny_runs)
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    monkeypatch.setenv("COLUMNS", "150")
    tiny = load_table("tiny")
    configs = [cell.configs[0] for cell in tiny.cells]

    cells = match_runs(tiny, finished_runs(tiny_runs), stopped_runs(tiny_runs))
    assert [each.missing for each in cells] == [(0,), (0,)]
    unknown = estimate(cells[1], 0, cells, [], tiny_runs)
    assert unknown.seconds is None and set(unknown.stages.values()) == {None}, "nothing was timed"

    one, other = tiny_runs / "extract" / "one", tiny_runs / "sweeps" / "s" / "1"
    run_extraction(configs[0], one, None, Console(quiet=True))
    cells = match_runs(tiny, finished_runs(tiny_runs), stopped_runs(tiny_runs))
    assert [each.missing for each in cells] == [(), (0,)] and cells[0].done[0].folder == one
    known = estimate(cells[1], 0, cells, [], tiny_runs)
    took = cells[0].done[0].stages
    stages = ("search", "validation", "report")
    assert known.seconds == pytest.approx(sum(took[name].seconds for name in stages)), "the rest is stored"
    assert estimate(cells[1], 0, cells[1:], [cells[0].done[0]], tiny_runs) == known, "runs of other tables tell too"
    main(["list", "tiny"])
    assert "1 of 2 jobs done, 1 missing: " in capsys.readouterr().out

    metrics = run_extraction(configs[1], other, None, Console(quiet=True))
    main(["show", "tiny", "--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    assert "Tiny & small" in printed and "without" in printed
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "tiny.csv").read_text())))
    (found,) = (line for line in lines if line["pruning"] == "without" and line["figure"] == "φ")
    assert float(found["value"]) == metrics["validation.preservation"]
    assert found["runs"] == str(other.relative_to(tiny_runs))
    manifest = json.loads((tmp_path / "out" / "tiny.json").read_text())
    assert [run["search.pruning"] for run in manifest["runs"]] == ["true", "false"]
    assert manifest["runs"][0]["job_key"] == json.loads((one / "manifest.json").read_text())["job_key"]
    main(["run", "tiny"])
    assert "all jobs are done" in capsys.readouterr().out
    main(["show", "tiny", "search.n_nodes=4", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.count("0 of 1") == 2, "runs of other settings"
    main(["list", "tiny", "search.n_nodes=4"])
    assert "0 of 2 jobs done, 2 missing" in capsys.readouterr().out
    assert list(csv.DictReader(io.StringIO((tmp_path / "out" / "tiny.csv").read_text()))) == lines
    main([])
    assert "tiny: Tiny & small; 2 cells, 2 jobs" in capsys.readouterr().out


def test_a_sweep_ends_with_the_command(tmp_path: Path) -> None:
    started = tmp_path / "started"
    sweep = f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
pathlib.Path({str(started)!r}).touch()
time.sleep(60)
"""

    def stop() -> None:
        while not started.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=stop)
    thread.start()
    assert swept([sys.executable, "-c", sweep]) == 143
    thread.join()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_search_beyond_the_limit_is_out_of_memory_until_the_limit_is_raised(tiny_runs: Path, tmp_path: Path) -> None:
    limited = tiny_extract(tiny_runs, search__memory_limit_mb=5, search__n_nodes=6)
    assert job_key(limited) == job_key(tiny_extract(tiny_runs, search__n_nodes=6)), "the limit decides no result"
    with pytest.raises(MemoryLimitError, match=r"search\.memory_limit_mb: expected a search of at most 5 MB, found"):
        run_extraction(limited, tmp_path / "extract" / "a", None, Console(quiet=True))
    (stopped,) = stopped_runs(tmp_path).values()
    assert stopped.limit_mb == 5 < stopped.peak_mb
    raised = tiny_extract(tiny_runs, search__memory_limit_mb=int(stopped.peak_mb) + 1, search__n_nodes=6)
    tiny = table(published=[], not_run=[])
    tiny = replace(tiny, cells=tuple(replace(tiny.cells[0], configs={0: config}) for config in (limited, raised)))
    cells = match_runs(tiny, {}, stopped_runs(tmp_path))
    assert [each.missing for each in cells] == [(), (0,)]
    text = markdown(view(tiny, cells))
    assert f"0 of 1, 1 out of memory | out of memory ({stopped.peak_mb:,.0f} MB, limit 5 MB) |" in text
    assert f"out of memory,memory held [MB],{stopped.peak_mb}" in csv_text(view(tiny, cells))


def test_folders_that_are_no_finished_runs(tmp_path: Path) -> None:
    for name, files in {
        "killed": {"manifest.json": '{"job_key": "k", "stages": {}}'},
        "cut": {"manifest.json": '{"job_key": "k", "stages": {}}', "metrics.json": '{"a": 1'},
        "older": {"manifest.json": '{"stages": {}}', "metrics.json": "{}"},
    }.items():
        (tmp_path / "extract" / name).mkdir(parents=True)
        for file, text in files.items():
            (tmp_path / "extract" / name / file).write_text(text)
    assert finished_runs(tmp_path) == {}


def write_run(folder: Path, key: str) -> None:
    """What tables read of a finished run."""
    folder.mkdir(parents=True)
    stages = {"lm": {"key": "x", "reused": False, "seconds": 2.5, "peak_mb": 3}}
    manifest = {"job_key": key, "git_revision": None, "versions": {}, "stages": stages}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "metrics.json").write_text('{"m": 1}')


def test_the_newest_of_two_runs_counts(tmp_path: Path) -> None:
    for second, name in enumerate(("b", "a")):
        folder = tmp_path / "sweeps" / name / "0"
        write_run(folder, "k")
        os.utime(folder / "manifest.json", ns=(second, second))
    (tmp_path / "sweeps" / "a" / "0" / "tracking.json").write_text('{"id": "i", "folder": "../../../wandb/offline-i"}')
    (run,) = finished_runs(tmp_path).values()
    assert run.tracked == str(tmp_path / "wandb" / "offline-i")
    assert run.folder == tmp_path / "sweeps" / "a" / "0"
    assert run.metrics == {"m": 1, "stage.lm.seconds": 2.5, "stage.lm.peak_mb": 3}


def test_runs_elsewhere_are_found_through_the_jobs_that_have_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs, config = tmp_path / "runs", tiny_extract(tmp_path / "runs")
    (tmp_path / "disk" / "results").mkdir(parents=True)
    runs.symlink_to(tmp_path / "disk" / "results")
    folders = {"elsewhere": tmp_path / "sweep" / "0", "below": runs / "sweeps" / "s" / "0"}
    for key, folder in folders.items():
        write_run(folder, key)
        remember_finished(config, folder)
    write_run(tmp_path / "forgotten", "forgotten")
    (runs / "jobs" / "gone-0.json").write_text('{"folder": "../gone"}')
    assert {key: run.folder for key, run in finished_runs(runs).items()} == folders
    monkeypatch.chdir(tmp_path)
    assert finished_runs(Path("runs")).keys() == folders.keys()
    write_run(tmp_path / "later", "other")
    (tmp_path / "later" / "manifest.json").rename(folders["elsewhere"] / "manifest.json")
    assert finished_runs(runs).keys() == {"other", "below"}, "another job has got the folder"


def test_shared_results_are_paid_once() -> None:
    assert total([Estimate({"a": 5.0, "b": 1.0}), Estimate({"a": 5.0, "c": 2.0})]) == 8.0
    assert total([Estimate({"a": 5.0}), Estimate({"b": None})]) is None and total([]) == 0
    assert spent([finished("x", 2.0), finished("y", 3.0)]) == 12.0, "one model, two searches"


def test_a_run_covers_what_is_missing_and_no_more() -> None:
    tiny = table()
    done = with_runs(tiny, {0: finished("x"), 1: finished("y"), 2: finished("z")}, {0: finished("w")})
    assert narrowed(done) == ["search.pruning=false", "task=sorting", "seed=1,2"]
    nothing: list[CellRuns] = with_runs(tiny, {}, {})
    assert narrowed(nothing) == ["search.pruning=true,false", "task=sorting", "seed=0,1,2"]


def test_a_typo_in_what_a_run_changes_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    with pytest.raises(SystemExit) as stop:
        main(["run", "tiny", "search.n_node=3", f"--config-dir={conf}"])
    assert stop.value.code == 1
    shown = capfd.readouterr().err.strip()
    assert shown == "error: search.n_node: expected a known key; did you mean search.n_nodes?"


def test_titles_and_files_are_never_read_as_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf, out = conf_with_tiny(tmp_path / "conf", tmp_path / "runs"), tmp_path / "[out]"
    file = conf / "experiment" / "tiny.yaml"
    file.write_text(file.read_text().replace("Tiny & small", "Tiny [s]"))
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    (tmp_path / "runs").mkdir()
    main([])
    main(["list"])
    assert capsys.readouterr().out.count("tiny: Tiny [s]") == 2
    main(["show", "tiny", "--out", str(out)])
    assert f"written: {out / 'tiny.md'} " in capsys.readouterr().out


def test_a_table_without_a_mode_is_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    file = conf / "experiment" / "tiny.yaml"
    file.write_text(file.read_text().replace("  mode: MULTIRUN\n", ""))
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        main(["run", "tiny", "--runs", str(tmp_path / "file" / "runs"), f"--config-dir={conf}"])
    assert capfd.readouterr().err.startswith("error: paths.runs: expected a folder that can be written")


def test_an_unknown_table_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["show", "manes"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error: table: expected one of ")


def test_a_folder_that_is_not_there_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = conf_with_tiny(tmp_path / "conf", tmp_path / "runs")
    monkeypatch.setattr(definition, "conf_dir", lambda: conf)
    with pytest.raises(SystemExit):
        main(["show", "tiny", "--runs", str(tmp_path / "typo")])
    assert "paths.runs: expected a folder with runs, found no folder" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.slow
def test_an_experiment_runs_and_writes_its_table(tmp_path: Path) -> None:
    """In a copy of the source with a tiny experiment: extract.py alone, then hagd-tables, then W&B read back."""
    source, runs = tmp_path / "source", tmp_path / "runs"
    source.mkdir()
    shutil.copytree(ROOT / "hagd", source / "hagd", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "extract.py"):
        shutil.copy(ROOT / file, source)
    conf_with_tiny(source / "conf", runs, tracking={"mode": "offline"})

    def call(*command: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(source), "COLUMNS": "150"}
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "1 of 1 jobs done" in call(str(source / "extract.py"), "experiment=tiny", "search.pruning=true")
    assert (runs / "tables" / "tiny.md").read_text().count("0 of 1") == 1, "written at the end, one cell missing"
    listed = call("-m", "hagd.tables", "list", "tiny")
    assert "1 of 2 jobs done, 1 missing: " in listed and "unknown" not in listed
    assert "1 of 1 jobs done" in call("-m", "hagd.tables", "run", "tiny"), "the missing one alone"
    assert "0 of 1" not in call("-m", "hagd.tables", "show", "tiny")
    last = read_run(offline_runs(runs)[-1])
    logged = last.tables["tiny"]
    assert logged.columns[:4] == ("pruning", "record", "figure", "value") and logged.columns[-2:] == ("runs", "wandb")
    measured = [row for row in logged.rows if row[1] == "measured"]
    assert len(measured) == 4 and all((runs / row[-2]).is_dir() for row in measured)
