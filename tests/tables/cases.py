"""Small tables: an experiment in a folder of its own, and runs that need no model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import yaml

from hagd.cli.paths import conf_dir
from hagd.tables.definition import Cell, Table, TableSpec
from hagd.tables.runs import FinishedRun, StageCost
from hagd.tables.view import CellRuns
from tests.builders import tiny_settings

SPEC: dict[str, Any] = {
    "title": "Tiny & small",
    "note": "A note, 100 % plain.",
    "axes": {
        "search.pruning": {"label": "pruning", "values": {"true": "with", "false": "without"}},
        "task": {"label": "task"},
    },
    "columns": {
        "preservation": {
            "metric": "validation.preservation",
            "label": "φ",
            "controls": {"r": "control.random.preservation"},
        },
        "nodes": {"metric": "circuit.nodes", "label": "nodes", "digits": 0},
    },
    "controls": {"r": "random nodes"},
    "published": [
        {
            "row": {"search.pruning": "true"},
            "figures": {"preservation": "0.97", "nodes": "47"},
            "of": "GPT-2 Small",
            "source": "Table II",
        },
        {"figures": {"preservation": "0.74–0.88"}, "of": "language_tasks", "source": "abstract"},
    ],
    "not_run": [{"row": {"search.pruning": "true", "task": "ioi"}, "needs": "70_B parameters"}],
}


def table(**changes: Any) -> Table:
    """Two cells of three seeds, `task=sorting` with and without pruning; their configurations are never used."""
    spec = TableSpec.model_validate_json(TableSpec.model_validate(_tuples({**SPEC, **changes})).model_dump_json())
    values = [{"search.pruning": value, "task": "sorting"} for value in ("true", "false")]
    return Table("tiny", spec, tuple(Cell(each, {}) for each in values))


def _tuples(spec: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in spec.items()}


def finished(name: str, seconds: float = 1.0, **metrics: float) -> FinishedRun:
    """A run in the folder `name`; `validation__preservation` stands for `validation.preservation`."""
    dotted = {key.replace("__", "."): value for key, value in metrics.items()}
    stages = {"lm": StageCost("shared", 7.0, 10), "search": StageCost(f"search-{name}", seconds, 20)}
    return FinishedRun(Path(), Path(name), name, dotted, stages, "abc", {"torch": "2"}, f"wandb/{name}")


def with_runs(of: Table, *runs: dict[int, FinishedRun]) -> list[CellRuns]:
    """The cells of a table with given runs a seed, of three asked for."""
    keys = {0: "a", 1: "b", 2: "c"}
    return [CellRuns(cell, keys, done, {}) for cell, done in zip(of.cells, runs, strict=True)]


def conf_with_tiny(folder: Path, runs: Path, **settings: Any) -> Path:
    """The configuration with an experiment `tiny`: two searches in a tiny model, one seed each."""
    shutil.copytree(conf_dir(), folder, ignore=shutil.ignore_patterns("experiment"))
    tiny = {**tiny_settings(runs), **settings}
    del tiny["seed"]
    table: dict[str, Any] = {
        "_target_": "hagd.tables.callback.WriteTable",
        **SPEC,
        "axes": {"search.pruning": SPEC["axes"]["search.pruning"]},
        "not_run": [],
    }
    sweep = {"params": {"search.pruning": "true,false", "seed": "0"}}
    tiny["search"] = {**tiny["search"], "memory_limit_mb": 100_000}
    experiment = {
        "defaults": [{"override /task": "sorting"}],
        **tiny,
        "hydra": {"mode": "MULTIRUN", "sweeper": sweep, "callbacks": {"table": table}},
    }
    (folder / "experiment").mkdir()
    (folder / "experiment" / "tiny.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(experiment, sort_keys=False, allow_unicode=True)
    )
    (folder / "experiment" / "plain.yaml").write_text("# @package _global_\nsearch: {gates: false}\n")
    return folder
