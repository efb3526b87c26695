"""Read an offline run back from its `.wandb` log, through the program behind W&B's own `wandb leet inspect`.

The command itself imports all of W&B first, which takes a second each time.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wandb.util import get_core_path


@dataclass(frozen=True)
class LoggedTable:
    """A table as it was logged."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class LoggedRun:
    """Content of one run.

    Attributes:
        name: display name.
        state: `finished`, `failed`, or what W&B calls a run that did not end.
        exit_code: None while a run has not ended, or was killed.
        config: as passed to `wandb.init`.
        summary: last value of every metric and every summary figure; media are left out. Values that JSON lacks
            appear as text (`"NaN"`, `"Infinity"`).
        history: one dict a logged step, W&B's own `_` fields and media left out.
        tables: name → table.
        media: name → file of a figure or HTML page.
        artifacts: name → paths inside the artifact; W&B's own artifacts that hold tables are left out.
        used: names of artifacts that are inputs.
    """

    name: str
    state: str
    exit_code: int | None
    config: dict[str, Any]
    summary: dict[str, Any]
    history: tuple[dict[str, Any], ...]
    tables: dict[str, LoggedTable]
    media: dict[str, Path]
    artifacts: dict[str, tuple[str, ...]]
    used: tuple[str, ...]


def offline_runs(directory: Path) -> list[Path]:
    """Folders of the offline runs below `directory`, the root that was given to `tracked_run`, oldest first."""
    return sorted((directory / "wandb").glob("offline-run-*"))


def read_run(folder: Path) -> LoggedRun:
    """Read the run in `folder`."""
    overview = json.loads(inspect(folder, "--summary"))
    records = [json.loads(line) for line in inspect(folder).splitlines()]
    values = overview["summary"]
    media = {name: folder / "files" / value["path"] for name, value in values.items() if _is_file(value)}
    tables = {name: path for name, path in media.items() if values[name]["_type"] == "table-file"}
    artifacts = [record["artifact"] for record in records if is_artifact(record)]
    history = [_plain(record["history"]["item"]) for record in records if record["type"] == "history"]
    return LoggedRun(
        name=overview["name"],
        state=overview["state"],
        exit_code=overview.get("exit_code"),
        config=overview["config"],
        summary=_plain({name: value for name, value in values.items() if name not in media}),
        history=tuple(item for item in history if item),
        tables={name: _read_table(path) for name, path in tables.items()},
        media={name: path for name, path in media.items() if name not in tables},
        artifacts=dict(_artifact(each) for each in artifacts if not each.get("use_after_commit")),
        used=tuple(each["name"] for each in artifacts if each.get("use_after_commit")),
    )


def inspect(folder: Path, *options: str) -> str:
    """Records of the run in `folder`, a line of JSON each."""
    (log,) = folder.glob("*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", *options, "--run-file", log, folder]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _is_file(value: Any) -> bool:
    return isinstance(value, dict) and str(value.get("_type", "")).endswith("-file")


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Without W&B's own fields; in the history media appear as `name._type`, `name.path`, …"""
    media = {name.removesuffix("._type") for name in values if name.endswith("._type")}
    return {
        name: value
        for name, value in values.items()
        if not name.startswith("_") and not any(name.startswith(f"{item}.") for item in media)
    }


def _read_table(path: Path) -> LoggedTable:
    content = json.loads(path.read_text())
    return LoggedTable(tuple(content["columns"]), tuple(tuple(row) for row in content["data"]))


def is_artifact(record: dict[str, Any]) -> bool:
    return bool(record["type"] == "artifact" and record["artifact"]["type"] != "run_table")


def _artifact(record: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    return record["name"], tuple(entry["path"] for entry in record["manifest"]["contents"])
