from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hagd.report.records import ReportData

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))  # scripts beside each other, not a package

from synthetic_report import build_report


@pytest.fixture
def make_report() -> Callable[..., ReportData]:
    """Builder of synthetic reports."""
    return build_report


@pytest.fixture(scope="session")
def report() -> ReportData:
    """200 nodes, 2,000 edges."""
    return build_report()
