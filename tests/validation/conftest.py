from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from hagd.pipeline.pipeline import Pipeline
from tests.builders import tiny_extract


@pytest.fixture(scope="module")
def pipeline(tiny_runs: Path) -> Pipeline:
    """The tiny extraction, whose stages are stored once for all tests."""
    return Pipeline(tiny_extract(tiny_runs), Console(quiet=True))
