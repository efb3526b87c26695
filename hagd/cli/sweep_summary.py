"""One table at the end of a sweep: every job's overrides, status and main figures.

A Hydra callback. Jobs may have run in other processes or on other machines, so only the files in the jobs'
folders are read: `.hydra/overrides.yaml`, `metrics.json` after success and `error.txt` after a failure.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

if TYPE_CHECKING:
    from rich.table import Table

_LABEL_WIDTH = 7
_NARROW: dict[str, Any] = {"pad_edge": False, "show_edge": False, "padding": (0, 1, 0, 0)}

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

Status = Literal["done", "failed", "unfinished"]


@dataclass(frozen=True)
class Job:
    """One job of a sweep.

    Attributes:
        folder: its output folder.
        overrides: as `key=value`.
        status: `unfinished` when it left neither result nor error (killed, or still running).
        figures: what `metrics.json` has of `FIGURES`.
        error: first line of `error.txt`, else None.
    """

    folder: str
    overrides: tuple[str, ...]
    status: Status
    figures: dict[str, float]
    error: str | None


def read_jobs(sweep_dir: Path) -> list[Job]:
    """Every job below `sweep_dir`, in the order of their numbers."""
    folders = {file.parent.parent for file in sweep_dir.rglob(".hydra/overrides.yaml")}
    return [_read_job(folder) for folder in sorted(folders, key=lambda folder: _natural(folder.relative_to(sweep_dir)))]


def write_summary(sweep_dir: Path, jobs: list[Job]) -> None:
    """Write `sweep.json`, `summary.md` and `summary.html` into `sweep_dir`."""
    (sweep_dir / "sweep.json").write_text(json.dumps([asdict(job) for job in jobs], indent=1))
    header, rows = _columns(jobs), [_row(job, jobs) for job in jobs]
    text = _markdown(header, rows)
    if over_seeds := aggregate(jobs):
        text += "\nMean ± standard deviation over seeds:\n\n" + _markdown(*over_seeds)
    errors = "".join(f"\n- `{_label(job, jobs)}`: {job.error}" for job in jobs if job.error)
    (sweep_dir / "summary.md").write_text(text + (f"\nFailed:\n{errors}\n" if errors else ""))
    _write_page(sweep_dir, jobs)


def _write_page(sweep_dir: Path, jobs: list[Job]) -> None:
    """The table of all jobs, sortable, each linked to its report."""
    from hagd.report.html import publish
    from hagd.report.table_page import Cell, table_page

    rows = []
    for job in jobs:
        report = Path(job.folder) / "report.html"
        link = quote(os.path.relpath(report, sweep_dir)) if report.is_file() else None
        label, status, *texts = _row(job, jobs)
        figures = [Cell(text, job.figures.get(name)) for name, text in zip(_shown(jobs), texts, strict=True)]
        rows.append([Cell(label, link=link), Cell(f"{status}: {job.error}" if job.error else status), *figures])
    lead = f"{sum(job.status == 'done' for job in jobs)} of {len(jobs)} jobs done."
    publish(table_page(f"Sweep {sweep_dir.name}", _columns(jobs), rows, lead), sweep_dir / "summary.html")


def aggregate(jobs: list[Job]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the table over seeds, one row a setting; None when no setting has two finished seeds."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in jobs:
        if job.status == "done":
            groups.setdefault(tuple(part for part in job.overrides if not part.startswith("seed=")), []).append(job)
    if all(len(group) < 2 for group in groups.values()):
        return None
    names = _shown(jobs)
    common = _common(jobs)
    rows = [
        [
            " ".join(part for part in setting if part not in common) or "all",
            str(len(group)),
            *(_spread([job.figures[name] for job in group if name in job.figures]) for name in names),
        ]
        for setting, group in groups.items()
    ]
    return ["setting", "seeds", *(FIGURES[name] for name in names)], rows


def _spread(values: list[float]) -> str:
    if len(values) < 2:
        return _format(values[0] if values else None)
    mean, spread = statistics.mean(values), statistics.stdev(values)
    if spread == 0:
        return _format(mean)
    digits = 0 if abs(mean) >= 100 else 2 if abs(mean) >= 0.1 else 3
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


class SweepSummary(Callback):
    """Prints the table, and writes it to the sweep's folder, when all jobs of a multirun have ended.

    Hydra skips `on_multirun_end` when a job failed, so the summary is also due when the process exits.
    """

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.register(_summarise, Path(str(config.hydra.sweep.dir)).absolute())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        atexit.unregister(_summarise)
        _summarise(Path(str(config.hydra.sweep.dir)).absolute())


def _summarise(sweep_dir: Path) -> None:
    jobs = read_jobs(sweep_dir)
    if jobs:  # none when the sweep failed before its first job started; Hydra prints why
        write_summary(sweep_dir, jobs)
        _print_table(sweep_dir, jobs)


def _print_table(sweep_dir: Path, jobs: list[Job]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    done = sum(job.status == "done" for job in jobs)
    table = Table(title=f"{done} of {len(jobs)} jobs done", box=box.SIMPLE_HEAD, **_NARROW)
    label, _, *figures = _columns(jobs)
    for name in (label, *figures):
        _add_column(table, name, first=name == label)
    for job in jobs:
        label, status, *figures = _row(job, jobs)
        ended = job.status == "done"  # the colour alone would be lost in a file
        table.add_row(*map(escape, (label if ended else f"{label} {status}", *figures)), style=None if ended else "red")
    console = Console()
    console.print(table)
    if over_seeds := aggregate(jobs):
        means = Table(title="mean ± standard deviation over seeds", box=box.SIMPLE_HEAD, **_NARROW)
        for number, name in enumerate(over_seeds[0]):
            _add_column(means, name, first=number == 0)
        for row in over_seeds[1]:
            means.add_row(*(escape(cell).replace(" ± ", "\n±") for cell in row))
        console.print(means)
    for job in jobs:
        if job.error:
            console.print(f"[red]{escape(_label(job, jobs))}[/red]: {escape(job.error)}", soft_wrap=True)
    console.print(f"[dim]{escape(str(sweep_dir / 'summary.md'))}[/dim]", soft_wrap=True)


def _add_column(table: Table, name: str, *, first: bool) -> None:
    """A column whose figures stay in one piece on 80 columns; the first, the setting's, folds."""
    if first:
        table.add_column(name, overflow="fold", min_width=_LABEL_WIDTH)
    else:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)


def _read_job(folder: Path) -> Job:
    overrides = OmegaConf.to_container(OmegaConf.load(folder / ".hydra" / "overrides.yaml"))
    assert isinstance(overrides, list)
    error = _first_line(folder / "error.txt")
    figures = _read_figures(folder / "metrics.json")
    status: Status = "failed" if error is not None else "unfinished" if figures is None else "done"
    return Job(str(folder), tuple(map(str, overrides)), status, figures or {}, error)


def _first_line(file: Path) -> str | None:
    if not file.exists():
        return None
    lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
    return lines[0] if lines else "no message"


def _read_figures(file: Path) -> dict[str, float] | None:
    """The main figures in `file`, whose names may be dotted or nested; None without a readable file."""
    try:
        metrics = _flatten(json.loads(file.read_text()))
    except (FileNotFoundError, ValueError):
        return None
    return {name: metrics[name] for name in FIGURES if isinstance(metrics.get(name), int | float)}


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: leaf for key, item in value.items() for name, leaf in _flatten(item, f"{prefix}{key}.").items()}


def _shown(jobs: list[Job]) -> list[str]:
    """Keys that at least one job has."""
    return [name for name in FIGURES if any(name in job.figures for job in jobs)]


def _columns(jobs: list[Job]) -> list[str]:
    return ["job", "status", *(FIGURES[name] for name in _shown(jobs))]


def _row(job: Job, jobs: list[Job]) -> list[str]:
    return [_label(job, jobs), job.status, *(_format(job.figures.get(name)) for name in _shown(jobs))]


def _label(job: Job, jobs: list[Job]) -> str:
    """What sets the job apart: its overrides without those that all jobs share."""
    common = _common(jobs)
    return " ".join(part for part in job.overrides if part not in common) or Path(job.folder).name


def _common(jobs: list[Job]) -> set[str]:
    return set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()


def _format(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if (value == int(value) and abs(value) > 1) or abs(value) >= 100 else f"{value:.3f}"


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sorts `10` after `9`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]
