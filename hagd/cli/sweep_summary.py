"""One table at the end of a sweep: every job's overrides, status, main figures and W&B run. A Hydra callback."""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from omegaconf import DictConfig

from hagd.cli.sweep_end import AtSweepEnd
from hagd.cli.sweep_jobs import ENDED_WELL, FIGURES, Job, expected_jobs, read_jobs

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_LABEL_WIDTH = 11
_NARROW: dict[str, Any] = {"pad_edge": False, "show_edge": False, "padding": (0, 1, 0, 0)}


def write_summary(sweep_dir: Path, jobs: list[Job]) -> None:
    """Write `sweep.json`, `summary.md` and `summary.html` into `sweep_dir`."""
    (sweep_dir / "sweep.json").write_text(json.dumps([asdict(job) for job in jobs], indent=1))
    header, rows = _columns(jobs), [_row(job, jobs) for job in jobs]
    for job, row in zip(jobs, rows, strict=True):
        if link := _run_link(job, sweep_dir):
            row[-1] = f"[{row[-1]}]({link})"
    text = f"{_title(jobs)}.\n\n" + _markdown(header, rows)
    if over_seeds := aggregate(jobs):
        text += "\nMean ± standard deviation over seeds:\n\n" + _markdown(*over_seeds)
    errors = "".join(f"\n- `{_label(job, jobs)}`: {job.error}" for job in jobs if job.error)
    failed = f"\nFailed:\n{errors}\n" if errors else ""
    (sweep_dir / "summary.md").write_text(text + failed, encoding="utf-8")
    _write_page(sweep_dir, jobs)


def _write_page(sweep_dir: Path, jobs: list[Job]) -> None:
    """The table of all jobs, sortable, each linked to its report and its W&B run."""
    from hagd.report.html import publish
    from hagd.report.table_page import Cell, table_page

    rows = []
    for job in jobs:
        report = Path(job.folder) / "report.html"
        link = quote(os.path.relpath(report, sweep_dir)) if job.folder and report.is_file() else None
        label, status, *texts = _row(job, jobs)
        figures = [Cell(text, job.figures.get(name)) for name, text in zip(_shown(jobs), texts, strict=False)]
        run = [Cell(texts[-1], link=_run_link(job, sweep_dir))] if _tracked(jobs) else []
        rows.append([Cell(label, link=link), Cell(f"{status}: {job.error}" if job.error else status), *figures, *run])
    publish(table_page(f"Sweep {sweep_dir.name}", _columns(jobs), rows, f"{_title(jobs)}."), sweep_dir / "summary.html")


def _run_link(job: Job, sweep_dir: Path) -> str | None:
    """The page of a W&B run, or the folder of an offline one."""
    if job.run is None:
        return None
    return job.run if "://" in job.run else quote(os.path.relpath(job.run, sweep_dir))


def aggregate(jobs: list[Job]) -> tuple[list[str], list[list[str]]] | None:
    """Header and rows of the table over seeds, one row a setting; None when no setting has two finished seeds."""
    groups: dict[tuple[str, ...], list[Job]] = {}
    for job in {job.overrides: job for job in jobs}.values():  # a sweeper may ask for the same job twice
        if job.status in ENDED_WELL:
            groups.setdefault(tuple(part for part in job.overrides if not part.startswith("seed=")), []).append(job)
    if all(len(group) < 2 for group in groups.values()):
        return None
    names = _shown(jobs)
    rows = [
        [
            _short(setting, jobs) or "all",
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


class SweepSummary(AtSweepEnd):
    """Prints the table, and writes it to the sweep's folder, when all jobs of a multirun have ended."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._expected = expected_jobs(config)
        super().on_multirun_start(config, **kwargs)

    def sweep_ended(self, config: DictConfig) -> None:
        sweep_dir = Path(str(config.hydra.sweep.dir)).absolute()
        jobs = read_jobs(sweep_dir, self._expected)
        write_summary(sweep_dir, jobs)
        _print_table(sweep_dir, jobs)


def _print_table(sweep_dir: Path, jobs: list[Job]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=_title(jobs), box=box.SIMPLE_HEAD, **_NARROW)
    names = _shown(jobs)
    for number, name in enumerate(["job", *(FIGURES[name] for name in names)]):
        _add_column(table, name, first=number == 0)
    for job in jobs:
        figures = (_format(job.figures.get(name)) for name in names)
        table.add_row(_job_cell(job, jobs), *figures, style=None if job.status in ENDED_WELL else "red")
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
    for where in _where(jobs):
        console.print(f"[dim]{escape(where)}[/dim]", highlight=False, soft_wrap=True)
    console.print(f"[dim]{escape(str(sweep_dir / 'summary.md'))}[/dim]", highlight=False, soft_wrap=True)


def _title(jobs: list[Job]) -> str:
    done = sum(job.status in ENDED_WELL for job in jobs)
    reused = sum(job.status == "reused" for job in jobs)
    return f"{done} of {len(jobs)} jobs done" + (f", {reused} of them reused" if reused else "")


def _where(jobs: list[Job]) -> list[str]:
    """Where the W&B runs of the column `run` are: pages of the project, or the command that shows offline ones."""
    pages = {job.run.rpartition("/runs/")[0] for job in jobs if job.run and "://" in job.run}
    folders = {Path(job.run).parent for job in jobs if job.run and "://" not in job.run}
    return sorted(pages) + [f"wandb leet {os.path.relpath(folder)}" for folder in sorted(folders)]


def _add_column(table: Table, name: str, *, first: bool) -> None:
    """A column whose figures stay in one piece on 80 columns; the first, the setting's, folds."""
    if first:
        table.add_column(name, overflow="fold", min_width=_LABEL_WIDTH)
    else:
        table.add_column(name.replace(" ", "\n"), justify="right", no_wrap=True)


def _job_cell(job: Job, jobs: list[Job]) -> Text:
    """Setting, status and the W&B run's id, which terminals open: in one column, because the figures need the width."""
    from rich.text import Text

    cell = Text(f"{_label(job, jobs)} {job.status}")
    if job.run:
        page = job.run if "://" in job.run else Path(job.run).as_uri()
        cell.append(" ").append(job.run_id or "", style=f"link {page}")
    return cell


def _shown(jobs: list[Job]) -> list[str]:
    """Keys that at least one job has."""
    return [name for name in FIGURES if any(name in job.figures for job in jobs)]


def _columns(jobs: list[Job]) -> list[str]:
    return ["job", "status", *(FIGURES[name] for name in _shown(jobs)), *(["run"] if _tracked(jobs) else [])]


def _row(job: Job, jobs: list[Job]) -> list[str]:
    run = [job.run_id or "–"] if _tracked(jobs) else []
    return [_label(job, jobs), job.status, *(_format(job.figures.get(name)) for name in _shown(jobs)), *run]


def _tracked(jobs: list[Job]) -> bool:
    return any(job.run_id for job in jobs)


def _label(job: Job, jobs: list[Job]) -> str:
    """What sets the job apart: its overrides without those that all jobs share."""
    return _short(job.overrides, jobs) or Path(job.folder).name


def _short(overrides: Sequence[str], jobs: list[Job]) -> str:
    """`k=16` for `transcoder.k=16`, where no other key that varies ends in `k`."""
    common = _common(jobs)
    keys = {part.partition("=")[0] for job in jobs for part in job.overrides if part not in common}
    last = Counter(key.rpartition(".")[2] for key in keys)
    varying = (part.partition("=") for part in overrides if part not in common)
    return " ".join(
        f"{short if last[short := key.rpartition('.')[2]] == 1 else key}={value}" for key, _, value in varying
    )


def _common(jobs: list[Job]) -> set[str]:
    return set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()


def _format(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if (value == int(value) and abs(value) > 1) or abs(value) >= 100 else f"{value:.3f}"
