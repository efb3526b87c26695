"""Finished runs, found by the address of their job."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hagd.pipeline.finished import finished_folders

ROOTS = ("extract", "sweeps")
"""Folders below `paths.runs` that hold run folders; those of finished jobs may be elsewhere."""


@dataclass(frozen=True)
class StageCost:
    """What one stage of a run took when it was computed: address of its result, seconds, MB."""

    key: str
    seconds: float
    peak_mb: float


@dataclass(frozen=True)
class FinishedRun:
    """One run folder.

    Attributes:
        runs: the root that it was found below.
        folder: where it is.
        key: address of its job.
        metrics: `metrics.json`, with `stage.NAME.seconds` and `stage.NAME.peak_mb`.
        stages: name → cost.
        git_revision: code that made it.
        versions: of the packages.
        tracked: its W&B run: the page or, offline, the folder; None when it was not tracked.
    """

    runs: Path
    folder: Path
    key: str
    metrics: dict[str, float]
    stages: dict[str, StageCost]
    git_revision: str | None
    versions: dict[str, str]
    tracked: str | None

    def below_runs(self, place: Path | str) -> str:
        """A folder relative to the root, as it is called on every machine; a page of W&B as it is."""
        return str(place) if "://" in str(place) else os.path.relpath(place, self.runs)


@dataclass(frozen=True)
class StoppedRun:
    """A run whose search held more memory than it might: what it held and what it might hold, in MB."""

    peak_mb: float
    limit_mb: float


def stopped_runs(runs: Path) -> dict[str, StoppedRun]:
    """Address → the run of that job below `runs` that was stopped with the largest memory."""
    found: dict[str, StoppedRun] = {}
    for file in _below(runs, "stopped.json"):
        content = _json(file)
        if content is not None:
            run = StoppedRun(content["peak_mb"], content["limit_mb"])
            found[content["job_key"]] = max(run, found.get(content["job_key"], run), key=lambda each: each.peak_mb)
    return found


def finished_runs(runs: Path) -> dict[str, FinishedRun]:
    """Address → the newest finished run of that job below `runs`, or in a folder that `runs/jobs` names.

    Folders without metrics or address are no runs.
    """
    files = _below(runs, "manifest.json")
    elsewhere = finished_folders(runs) - {file.parent.resolve() for file in files}
    files += [folder / "manifest.json" for folder in elsewhere if (folder / "manifest.json").is_file()]
    found: dict[str, FinishedRun] = {}
    for file in sorted(files, key=lambda file: (file.stat().st_mtime_ns, str(file))):
        run = _read(runs, file.parent)
        if run is not None:
            found[run.key] = run
    return found


def _below(runs: Path, name: str) -> list[Path]:
    return [file for root in ROOTS for file in (runs / root).rglob(name)]


def _read(runs: Path, folder: Path) -> FinishedRun | None:
    """None when the run was killed while it wrote, or is older than the addresses."""
    manifest, metrics = _json(folder / "manifest.json"), _json(folder / "metrics.json")
    if manifest is None or metrics is None or "job_key" not in manifest:
        return None
    stages = {
        name: StageCost(stage["key"], stage["seconds"], stage["peak_mb"]) for name, stage in manifest["stages"].items()
    }
    for name, stage in stages.items():
        metrics |= {f"stage.{name}.seconds": stage.seconds, f"stage.{name}.peak_mb": stage.peak_mb}
    return FinishedRun(
        runs,
        folder,
        manifest["job_key"],
        metrics,
        stages,
        manifest["git_revision"],
        manifest["versions"],
        _tracked(folder),
    )


def _tracked(folder: Path) -> str | None:
    """From `tracking.json` of the run folder."""
    link = _json(folder / "tracking.json")
    if link is None:
        return None
    return str(link["url"]) if "url" in link else str((folder / link["folder"]).resolve())


def _json(file: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None
