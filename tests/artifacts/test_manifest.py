from __future__ import annotations

import platform
import re
import sys

import pytest
import torch

from hagd.artifacts.manifest import git_revision, peak_rss_mb, reset_peak_rss, versions


def test_versions_name_python_and_torch() -> None:
    found = versions()
    assert found["python"] == platform.python_version()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


def test_git_revision_is_a_commit_or_absent() -> None:
    revision = git_revision()
    assert revision is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", revision)


def test_peak_sees_a_large_allocation() -> None:
    before = peak_rss_mb()
    block = torch.ones(50 * 2**20 // 4 * 2)  # 100 MB
    assert peak_rss_mb() >= before
    assert peak_rss_mb() > block.nbytes / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak")
def test_peak_can_be_measured_anew() -> None:
    block = torch.ones(50 * 2**20)  # 200 MB
    high = peak_rss_mb()
    del block
    reset_peak_rss()
    assert peak_rss_mb() < high - 100
