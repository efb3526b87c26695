from __future__ import annotations

import gc
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: workers that share cores would wait for each other

import pytest
from rich.console import Console

from hagd.pipeline.extraction import run_extraction
from tests.builders import tiny_extract

gc.disable()  # while test modules are imported: what they define stays


def pytest_collection_finish() -> None:
    """Leave the modules out of every later collection of garbage, which would go through all of them."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder that holds the stages of `tiny_extract(tiny_runs)`; the run itself is in its folder `first`.

    Shared: extractions with other settings reuse its model and dictionaries, none may damage it.
    """
    runs = tmp_path_factory.mktemp("runs")
    run_extraction(tiny_extract(runs), runs / "first", None, Console(quiet=True))
    return runs


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the figures out, which take a third of a tiny extraction; for tests that look at something else."""
    monkeypatch.setattr("hagd.pipeline.outputs.write_figures", lambda *_: ())
