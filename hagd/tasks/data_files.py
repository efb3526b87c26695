"""Task data from local files and from the hub."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hagd.errors import TaskError
from hagd.hub import hub_problem

Record = dict[str, Any]

Columns = Mapping[str, type]
"""Name → type of the columns that a task reads."""

_NAMES = {str: "text", list: "a list", int: "a whole number"}


def matching_files(pattern: str) -> list[Path]:
    """The files that `task.data_files` names, a path or a glob pattern, in alphabetical order.

    Raises:
        TaskError: there is none.
    """
    names = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    files = [Path(name) for name in names if Path(name).is_file()]
    if not files:
        raise TaskError(f"task.data_files={pattern}: no such file; give the path (or pattern) of existing files")
    return files


def read_json(path: Path) -> Any:
    """The content of one JSON file.

    Raises:
        TaskError: not JSON.
    """
    try:
        return json.loads(_text(path))
    except ValueError as error:
        raise TaskError(f"task.data_files={path}: expected JSON, found {error}; repair the file") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TaskError(
            f"task.data_files={path}: expected JSON lines, found no UTF-8 text; convert other formats, such as "
            "Parquet, first"
        ) from None


def read_records(pattern: str, columns: Columns) -> list[Record]:
    """The rows of JSON Lines files (one object a line), or of files that hold one JSON array of objects.

    Raises:
        TaskError: no file, a line that is no JSON object, or a row without one of `columns` or with a value of
            another type there; names file and line.
    """
    records = []
    for path in matching_files(pattern):
        text = _text(path)
        if text.lstrip().startswith("["):
            rows = list(enumerate(read_json(path), start=1))
        else:
            rows = [
                (number, _parse(line, path, number))
                for number, line in enumerate(text.splitlines(), start=1)
                if line.strip()
            ]
        for number, row in rows:
            missing = [column for column in columns if not isinstance(row, dict) or column not in row]
            if missing:
                raise TaskError(
                    f"task.data_files={path}: row {number} lacks {', '.join(missing)}; expected the columns "
                    f"{', '.join(columns)}"
                )
            for column, kind in columns.items():
                if not isinstance(row[column], kind):
                    raise TaskError(
                        f"task.data_files={path}: row {number} has {column}={row[column]!r}; expected {_NAMES[kind]}"
                    )
            records.append(row)
    return records


def _parse(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise TaskError(
            f"task.data_files={path}: line {number} is no JSON ({error}); expected one object a line, convert other "
            "formats, such as CSV, first"
        ) from None


def load_rows(data_files: str | None, dataset: str, subset: str | None, split: str, columns: Columns) -> list[Record]:
    """The rows of local files if given, otherwise of a hub data set.

    Raises:
        TaskError: as `read_records`; or the hub cannot be reached or has no such data set or column.
    """
    if data_files is not None:
        return read_records(data_files, columns)
    from datasets import load_dataset

    advice = f"set task.data_files=… to local JSON lines with the columns {', '.join(columns)}"
    problem = None if Path(dataset).exists() else hub_problem()
    if problem is not None:
        raise TaskError(f"task.dataset={dataset}: {problem}; {advice}, or check the network")
    try:
        rows = load_dataset(dataset, subset, split=split)
    # The hub client raises different errors for each way of being unreachable; all of them end here.
    except Exception as error:
        reason = str(error).strip().splitlines()
        found = f"{type(error).__name__}: {reason[0] if reason else ''}"
        raise TaskError(f"task.dataset={dataset} (split {split}): could not be loaded ({found}); {advice}") from error
    missing = set(columns) - set(rows.column_names)
    if missing:
        raise TaskError(f"task.dataset={dataset}: lacks the columns {', '.join(sorted(missing))}; {advice}")
    return [dict(row) for row in rows.select_columns(list(columns))]
