"""The jobs of a sweep, read from the files in their folders: they may have run in other processes or on other machines.

`.hydra/overrides.yaml` is there from the start, `tracking.json` once W&B runs, `metrics.json` after success,
`error.txt` after a failure, `reused.json` instead of results that an earlier job has, as long as that one's are there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from hydra.conf import HydraConf

FIGURES = {
    "model.accuracy": "model",
    "circuit.nodes": "nodes",
    "validation.preservation": "φ",
    "empty.accuracy": "empty",
    "control.random.preservation": "φ random",
    "control.attribution.preservation": "φ IG",
    "curve.cpr_log": "CPR log",
    "graph.replacement": "replacement",
    "transcoder.fvu": "FVU",
    "time.total_s": "seconds",
}
"""What the tables show: key in `metrics.json` → column."""

Status = Literal["done", "reused", "failed", "unfinished", "not started"]
ENDED_WELL: tuple[Status, ...] = ("done", "reused")


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        folder: its output folder; of one that is reused, that of the earlier job.
        overrides: as `key=value`.
        status: `reused` when an earlier job has its results, `unfinished` when it left neither result nor error
            (killed, or still running).
        figures: what `metrics.json` has of `FIGURES`.
        error: first line of `error.txt`, else None.
        run_id: id of its W&B run, None when nothing is tracked.
        run: page of that run, or its folder when it is offline.
    """

    folder: str
    overrides: tuple[str, ...]
    status: Status
    figures: dict[str, float]
    error: str | None
    run_id: str | None = None
    run: str | None = None


def read_jobs(sweep_dir: Path, expected: Sequence[tuple[str, ...]] = ()) -> list[Job]:
    """Every job below `sweep_dir`, in the order of their numbers.

    With `expected` those alone, the ones that never started last: others are of an earlier sweep in the same folder.
    """
    folders = {file.parent.parent for file in sweep_dir.rglob(".hydra/overrides.yaml")}
    jobs = [_read_job(folder) for folder in sorted(folders, key=lambda folder: _natural(folder.relative_to(sweep_dir)))]
    if not expected:
        return jobs
    left, found = Counter(expected), []
    for job in jobs:
        if left[job.overrides]:
            left[job.overrides] -= 1
            found.append(job)
    return found + [Job("", each, "not started", {}, None) for each in left.elements()]


def expected_jobs(config: DictConfig) -> list[tuple[str, ...]]:
    """Overrides of every job that the command line asks for; empty when a sweeper makes them as it goes.

    To be asked while Hydra runs, which knows what a `glob` stands for.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not str(sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        return []
    given = [f"{key}={value}" for key, value in (sweeper.params or {}).items()] + list(config.hydra.overrides.task)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(given), None)
    return [tuple(job) for job in jobs]


def swept_overrides(hydra: HydraConf) -> tuple[str, ...]:
    """The overrides of a running job, `key=value`, of the keys that its sweep varies."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    keys = set(hydra.sweeper.params or {})
    asked = Path(hydra.sweep.dir) / "multirun.yaml"
    if asked.is_file():  # some sweepers write none
        given = parser.parse_overrides(list(OmegaConf.load(asked).hydra.overrides.task))
        keys |= {override.key_or_group for override in given if override.is_sweep_override()}
    own = list(hydra.overrides.task)
    return tuple(
        text for text, override in zip(own, parser.parse_overrides(own), strict=True) if override.key_or_group in keys
    )


def _read_job(folder: Path) -> Job:
    overrides = _overrides(folder / ".hydra" / "overrides.yaml")
    earlier = _read_json(folder / "reused.json")
    reused = bool(earlier) and _job_key(folder / earlier["folder"]) == earlier.get("job_key")
    results = folder / earlier["folder"] if reused else folder
    error = _first_line(folder / "error.txt")
    metrics = _flatten(_read_json(results / "metrics.json"))
    figures = {name: metrics[name] for name in FIGURES if isinstance(metrics.get(name), int | float)}
    status: Status = "unfinished"
    if error is not None:
        status = "failed"
    elif metrics:
        status = "reused" if reused else "done"
    tracked = _read_json(results / "tracking.json")
    run = tracked.get("url") or (str((results / tracked["folder"]).resolve()) if "folder" in tracked else None)
    return Job(str(results.resolve()), overrides, status, figures, error, tracked.get("id"), run)


def _overrides(file: Path) -> tuple[str, ...]:
    """As Hydra wrote them; none where it was killed while it wrote."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return ()
    return tuple(map(str, content)) if isinstance(content, list) else ()


def _job_key(folder: Path) -> str | None:
    """Of the job whose results the folder holds."""
    return _read_json(folder / "manifest.json").get("job_key")


def _first_line(file: Path) -> str | None:
    if not file.exists():
        return None
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _read_json(file: Path) -> dict[str, Any]:
    """Empty without a readable file."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: leaf for key, item in value.items() for name, leaf in _flatten(item, f"{prefix}{key}.").items()}


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts `10` after `9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
