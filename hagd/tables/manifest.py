"""Which runs a written table rests on."""

from __future__ import annotations

import json
from pathlib import Path

from hagd.tables.cost import spent
from hagd.tables.definition import Table
from hagd.tables.view import CellRuns


def write_table_manifest(table: Table, cells: list[CellRuns], file: Path) -> None:
    """Write, per run, its settings, address, code revision, the addresses of its stages and what they took."""
    done = [run for each in cells for run in each.done.values()]
    content = {
        "table": table.name,
        "settings": list(table.changed),
        "computing_seconds": round(spent(done), 1),
        "versions": {
            name: sorted({run.versions[name] for run in done if name in run.versions})
            for name in sorted({name for run in done for name in run.versions})
        },
        "runs": [
            {
                **each.cell.values,
                "seed": seed,
                "job_key": run.key,
                "git_revision": run.git_revision,
                "stages": {name: [stage.key, stage.seconds, stage.peak_mb] for name, stage in run.stages.items()},
            }
            for each in cells
            for seed, run in each.done.items()
        ],
    }
    file.write_text(json.dumps(content, indent=1) + "\n")
