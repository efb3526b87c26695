"""The tests of the Triton kernels without a GPU, in a process whose kernels Triton interprets on the CPU: it must know
before it is imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

FILES = ("test_triton_products.py", "test_triton_sums.py", "test_triton_selection.py", "test_float8.py")
SHAPES = "any_shape and (1-1-torch.float32 or 4100-64-torch.float32 or 70)"
FEW = f"(gradients and few) or in_pieces or parts or topk or alone or with_a_skip or ({SHAPES})"


@pytest.mark.parametrize(
    ("only", "at_least"), [(FEW, 16), pytest.param("", 60, marks=pytest.mark.slow)], ids=["few", "all"]
)
def test_in_the_interpreter(only: str, at_least: int) -> None:
    here = Path(__file__).parent
    options = ["-q", "-m", "gpu", "-k", only, "--noconftest", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, *(str(here / name) for name in FILES)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=here.parents[1], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= at_least, done.stdout
    assert (", 3 skipped" in done.stdout) == (not only), "those for a GPU alone"
