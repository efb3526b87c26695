"""What a result was made with: package versions, code revision, memory."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "hagd",
    "torch",
    "transformers",
    "pytorch-lightning",
    "torch-geometric",
    "numpy",
    "scipy",
    "safetensors",
    "datasets",
    "hydra-core",
    "wandb",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result; those not installed are left out."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    """Read once: their files are large, and what is imported stays what it was."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def git_revision() -> str | None:
    """Commit of the checkout this code runs from, `-dirty` appended after changes; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():  # an installed copy may lie in somebody else's repository
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def reset_peak_rss() -> None:
    """Start a new measurement of `peak_rss_mb` where the system allows it (Linux); elsewhere the peak keeps growing."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mb() -> float:
    """Largest resident memory of this process in MB, since `reset_peak_rss` on Linux, else since it started."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        line = next(line for line in lines if line.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
