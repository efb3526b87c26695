"""Sweeps that run beside each other or are killed: nothing is computed twice but the step that ran at a kill."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tests.cli.jobs import command, environment, run_command, tiny_overrides
from tests.cli.test_interruption import results

KILLS = 5


def start(runs: Path, cwd: Path, *overrides: str) -> subprocess.Popen[bytes]:
    arguments = command("-m", *tiny_overrides(runs), *overrides)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(arguments, cwd=cwd, env=environment(), **quiet)


def stored(runs: Path) -> dict[str, tuple[int, int]]:
    """Every finished result below `runs`, with what tells whether it was written again."""
    files = (runs / "artifacts").glob("[!.]*/[!.]*/meta.json")
    return {str(file.parent.relative_to(runs)): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def manifests(runs: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in (runs / "sweeps").rglob("manifest.json")]


def metrics(runs: Path) -> dict[str, dict[str, float]]:
    """Job key → what it found, for every job that finished below `runs`."""
    found = {}
    for marker in (runs / "jobs").glob("*.json"):
        folder = marker.parent / json.loads(marker.read_text())["folder"]
        found[marker.stem] = results(json.loads((folder / "metrics.json").read_text()))
    return found


@pytest.mark.slow
def test_two_sweeps_at_once_compute_every_result_once(tmp_path: Path) -> None:
    both = [start(tmp_path, tmp_path, "seed=0,1") for _ in range(2)]
    assert [sweep.wait(timeout=400) for sweep in both] == [0, 0]
    computed = [
        (stage, each["key"])
        for manifest in manifests(tmp_path)
        for stage, each in manifest["stages"].items()
        if not each["reused"]
    ]
    assert len(computed) == len(set(computed)) == len(stored(tmp_path))
    assert len(metrics(tmp_path)) == 2


@pytest.mark.slow
def test_a_sweep_that_is_killed_again_and_again_loses_only_the_running_step(tmp_path: Path) -> None:
    runs, random = tmp_path / "killed", Random(0)
    runs.mkdir()
    for _ in range(KILLS):
        before = stored(runs)
        until = len(before) + random.randint(0, 6)
        sweep = start(runs, tmp_path, "seed=0,1,2")
        deadline = time.monotonic() + 300
        while len(stored(runs)) < until and time.monotonic() < deadline and sweep.poll() is None:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.5))
        sweep.kill()
        sweep.wait()
        after = stored(runs)
        assert {key: after[key] for key in before} == before, "a finished result was written again"
    before = stored(runs)
    done = run_command(tmp_path, "-m", *tiny_overrides(runs), "seed=0,1,2")
    assert done.returncode == 0 and "3 of 3 jobs done" in done.stdout, done.stderr
    after = stored(runs)
    assert {key: after[key] for key in before} == before
    assert not any((runs / "artifacts" / "work").iterdir())
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run_command(tmp_path, "-m", *tiny_overrides(whole), "seed=0,1,2").returncode == 0
    assert metrics(runs) == metrics(whole) and len(metrics(whole)) == 3
