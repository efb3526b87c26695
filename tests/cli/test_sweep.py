"""A real sweep of `extract.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hagd.tracking.read_back import offline_runs
from tests.cli.jobs import run_command, tiny_overrides


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
    assert len(runs) == 2
    for run in runs:  # W&B's own reader does not show the group
        assert sweep.name.encode() in next(run.glob("*.wandb")).read_bytes()
