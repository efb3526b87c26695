"""The benchmark that a GPU is needed for, on a CPU: whether it works at all."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton")
@pytest.mark.parametrize(
    ("options", "timed"),
    [([], {"selection, triton", "step, torch"}), (["--heads"], {"step of two layers, tied head"})],
    ids=["parts", "heads"],
)
def test_it_measures_every_part_and_agrees_with_a_dense_step(
    tmp_path: Path, options: list[str], timed: set[str]
) -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "transcoders_gpu.py"
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--rounds", "1", "--json", "figures.json"]
    command += options
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((tmp_path / "figures.json").read_text())
    assert max(found["largest_relative_error"].values()) < 1e-6
    assert not [row["name"] for row in found["rows"] if row["error"]]
    assert timed <= {row["name"] for row in found["rows"]}
