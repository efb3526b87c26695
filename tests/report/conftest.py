from __future__ import annotations

from collections.abc import Callable

import pytest
from synthetic_report import build_report

from hagd.report.records import ReportData


@pytest.fixture
def make_report() -> Callable[..., ReportData]:
    """Builder of synthetic reports."""
    return build_report


@pytest.fixture(scope="session")
def report() -> ReportData:
    """200 nodes, 2,000 edges."""
    return build_report()
