"""Jobs that have finished: `runs/jobs/<key>-<tracking>.json` says in which folder; a sweep does not repeat them.

The second part is a hash of where the job is tracked.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hagd.artifacts.keys import canonical_json
from hagd.artifacts.store import disk_errors
from hagd.config.run import StagesConfig, TrainConfig
from hagd.pipeline.job_key import job_key

_TRACKED = {"mode", "project", "entity"}


@dataclass(frozen=True)
class FinishedJob:
    """A job that ended well.

    Attributes:
        key: its address.
        folder: its run folder.
        metrics: what its `metrics.json` holds.
    """

    key: str
    folder: Path
    metrics: dict[str, float]


def finished_job(config: StagesConfig) -> FinishedJob | None:
    """The job of the same results that has finished below the same `paths.runs`; None when there is none.

    One that was tracked elsewhere in W&B, whose folder or export is gone, or whose folder another job has got since,
    does not count. Nor do plans, which take no longer than looking.

    Raises:
        HagdError: files that the configuration names are missing.
    """
    key = job_key(config)
    try:
        folder = _folder(_marker(config, key))
        kept = json.loads((folder / "manifest.json").read_text())["job_key"]
        metrics = json.loads((folder / "metrics.json").read_text())
    except (OSError, ValueError, KeyError):
        return None
    if kept != key:
        return None
    exported = config.export.path if isinstance(config, TrainConfig) else None
    there = exported is None or Path(exported).expanduser().is_dir()
    return FinishedJob(key, folder, metrics) if there else None


def finished_folders(runs: Path) -> set[Path]:
    """The folders of jobs that have finished, below `runs` or elsewhere; other jobs may have got them since."""
    found = set()
    for marker in (runs / "jobs").glob("*.json"):
        with suppress(OSError, ValueError, KeyError):
            found.add(_folder(marker))
    return found


def remember_finished(config: StagesConfig, folder: Path) -> None:
    """Write the marker of a job whose results are complete in `folder`; one without a manifest, a plan, gets none."""
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        return
    # The key that the job ran with: files that the configuration names may have changed meanwhile.
    marker = _marker(config, json.loads(manifest.read_text())["job_key"])
    content = {"folder": os.path.relpath(folder.resolve(), marker.parent.resolve())}
    with disk_errors(marker):
        marker.parent.mkdir(parents=True, exist_ok=True)
        partial = marker.with_name(f".{marker.name}.{os.getpid()}")
        partial.write_text(json.dumps(content, indent=1))
        partial.rename(marker)


def may_be_overwritten(finished: FinishedJob, folder: Path) -> bool:
    """Whether a later job of the sweep that runs one in `folder` may get the folder of `finished`.

    It may when that is another one beside `folder` and has no lower number.
    """
    other, own = finished.folder, folder.resolve()
    numbers = other.name.isdigit() and own.name.isdigit()
    return other.parent == own.parent and other != own and not (numbers and int(other.name) < int(own.name))


def refer_to(finished: FinishedJob, folder: Path) -> None:
    """`reused.json` in the folder of a job that was not repeated: its key, and where its results lie from here."""
    content = {"job_key": finished.key, "folder": os.path.relpath(finished.folder, folder.resolve())}
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "reused.json").write_text(json.dumps(content))


def _folder(marker: Path) -> Path:
    content = json.loads(marker.read_text())
    return (marker.parent / content["folder"]).resolve()


def _marker(config: StagesConfig, key: str) -> Path:
    tracked = canonical_json(config.tracking.model_dump(mode="json", include=_TRACKED))
    name = f"{key}-{hashlib.sha256(tracked.encode()).hexdigest()[:8]}.json"
    return Path(config.paths.runs).absolute() / "jobs" / name
