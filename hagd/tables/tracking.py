"""A table as a W&B run of its own."""

from __future__ import annotations

from pathlib import Path

from hagd.config.run import TrackingConfig
from hagd.tables.formats import long_rows
from hagd.tables.view import View
from hagd.tracking.wandb_run import tracked_run


def track_table(view: View, files: list[Path], tracking: TrackingConfig, runs: Path) -> None:
    """Log the table, one line a figure with the run folders that it comes from, and the written files.

    Args:
        view: the table.
        files: as from `write_files`.
        tracking: W&B settings; offline unless asked.
        runs: root of the results.
    """
    with tracked_run(
        tracking,
        name=f"table-{view.name.replace('/', '-')}",
        group="tables",
        job_type="table",
        config={"table": view.name, "settings": list(view.changed)},
        directory=runs,
    ) as run:
        run.table(view.name, *long_rows(view))
        for file in files:
            run.artifact(f"{file.stem}-{file.suffix[1:]}-{run.id}", "table", file)
