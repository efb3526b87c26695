"""`hagd-tables`: list the tables, run what is missing, show and write one."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from hagd.tables.definition import Table
    from hagd.tables.runs import FinishedRun
    from hagd.tables.view import CellRuns


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    options, overrides = _parser().parse_known_args(arguments)
    if overrides and options.action not in ("run", "show"):
        _parser().error(f"expected options of Hydra after run and show alone, found {' '.join(overrides)}")

    from rich.console import Console

    from hagd.cli.config_files import refuse_unreadable_files
    from hagd.cli.groups import settle_groups
    from hagd.cli.terminal import never_fail_to_print
    from hagd.errors import HagdError

    never_fail_to_print()
    refuse_unreadable_files()
    settle_groups()
    console = Console()
    try:
        if options.action == "run":
            code = _run(options.name, [*_root(options.runs), *overrides], console)
            if code:
                sys.exit(code)
        elif options.action == "show":
            out = Path(options.out) if options.out else None
            show(options.name, [*_root(options.runs), *overrides], out, console)
        elif options.action == "list":
            names = [each for each in options.names if "=" not in each]
            settings = [each for each in options.names if "=" in each]
            _list(names, [*_root(options.runs), *settings], console)
        else:
            _overview(console)
    except HagdError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--runs", metavar="FOLDER", help="root of the results (default: paths.runs)")
    parser = argparse.ArgumentParser(
        prog="hagd-tables", description="Tables of measured runs. Without a command: their names."
    )
    actions = parser.add_subparsers(dest="action", metavar="list | run | show")
    listed = actions.add_parser("list", parents=[common], help="what is done, what is missing, what it would cost")
    listed.add_argument(
        "names",
        nargs="*",
        metavar="name | key=value",
        help="tables whose cells are shown (default: a line a table), and settings as for extract.py",
    )
    run = actions.add_parser("run", parents=[common], help="run what is missing; further arguments go to extract.py")
    shown = actions.add_parser(
        "show",
        parents=[common],
        help="print a table; write it as Markdown, LaTeX, CSV, W&B; further arguments are settings as for extract.py",
    )
    shown.add_argument("--out", metavar="FOLDER", help="where it is written (default: RUNS/tables)")
    for action in (run, shown):
        action.add_argument("name", help="an experiment that is a table, for example quick/main")
    return parser


def _root(runs: str | None) -> list[str]:
    """The option `--runs` as an override."""
    return [f"paths.runs={runs}"] if runs else []


def _read(name: str, overrides: Sequence[str]) -> tuple[Table, list[CellRuns], dict[str, FinishedRun], Path]:
    """A table, its cells with their runs, all finished runs by address, and the root of the results."""
    from hagd.tables.definition import load_table
    from hagd.tables.runs import finished_runs, stopped_runs
    from hagd.tables.view import match_runs

    table = load_table(name, overrides)
    root = Path(next(iter(table.cells[0].configs.values())).paths.runs)
    finished = finished_runs(root)
    return table, match_runs(table, finished, stopped_runs(root)), finished, root


def _overview(console: Console) -> None:
    """Names, titles and sizes alone: finding out what is done composes every job, which takes a while."""
    from rich.text import Text

    from hagd.tables.definition import SEED, descriptions

    for name, (spec, swept) in descriptions().items():
        *axes, seeds = [len(swept[axis]) for axis in (*spec.axes, SEED)]
        console.print(Text.assemble((name, "bold"), f": {spec.title}; {prod(axes)} cells, {prod(axes) * seeds} jobs"))
    console.print(
        "hagd-tables list [NAME ...]: what is done, what is missing and what it would cost; run NAME: what is missing; "
        "show NAME: the table",
        style="dim",
    )


def _list(names: Sequence[str], overrides: Sequence[str], console: Console) -> None:
    """Every cell of the named tables; without names, a line a table."""
    from rich.text import Text

    from hagd.tables.cost import estimate, total
    from hagd.tables.definition import table_names
    from hagd.tables.terminal import duration, print_cells

    for name in names or table_names():
        table, cells, finished, root = _read(name, overrides)
        missing = {
            (i, seed): estimate(each, seed, cells, finished.values(), root)
            for i, each in enumerate(cells)
            for seed in each.missing
        }
        jobs = sum(len(each.keys) for each in cells)
        cost = f", {len(missing)} missing: {duration(total(list(missing.values())))} on one core" if missing else ""
        console.print(Text.assemble((name, "bold"), f": {table.spec.title}"))
        if names:
            print_cells(cells, missing, console)
        console.print(f"  {len(cells)} cells, {jobs - len(missing)} of {jobs} jobs done{cost}", highlight=False)


def _run(name: str, arguments: Sequence[str], console: Console) -> int:
    """Launch the smallest sweep that covers every missing job; returns its exit code."""
    from hydra._internal.utils import get_args
    from rich.text import Text

    _, cells, _, _ = _read(name, get_args(list(arguments)).overrides)
    if not any(each.missing for each in cells):
        console.print(Text(" ".join([f"{name}: all jobs are done; hagd-tables show", name, *arguments])))
        return 0
    command = [sys.executable, "-m", "hagd.cli.extract", "--multirun", f"experiment={name}", *narrowed(cells)]
    command += arguments
    console.print(Text(" ".join(["hagd-extract", *command[3:]]), style="dim"), soft_wrap=True)
    return swept(command)


def swept(command: Sequence[str]) -> int:
    """Run a command that SIGTERM to this process stops, too; its exit code. Ctrl-C reaches it from the terminal."""
    with subprocess.Popen(command) as sweep:
        before = [
            (signal.SIGTERM, signal.signal(signal.SIGTERM, lambda *_: sweep.terminate())),
            (signal.SIGINT, signal.signal(signal.SIGINT, lambda *_: None)),  # it says what Ctrl-C left, and ends
        ]
        try:
            return sweep.wait()
        finally:
            for number, handler in before:
                signal.signal(number, handler)


def narrowed(cells: Sequence[CellRuns]) -> list[str]:
    """Overrides that leave out every value of an axis, and every seed, for which nothing is missing."""
    incomplete = [each for each in cells if each.missing]
    axes = {axis: dict.fromkeys(each.cell.values[axis] for each in incomplete) for axis in incomplete[0].cell.values}
    seeds = sorted({seed for each in incomplete for seed in each.missing})
    return [*(f"{axis}={','.join(values)}" for axis, values in axes.items()), f"seed={','.join(map(str, seeds))}"]


def show(name: str, overrides: Sequence[str], out: Path | None, console: Console) -> None:
    """Print a table, and write it to a folder and to W&B.

    Args:
        name: of its experiment.
        overrides: settings beside the experiment's.
        out: the folder; None: `tables` below the root of the results.
        console: where it is printed.
    """
    from rich.text import Text

    from hagd.artifacts.store import disk_errors
    from hagd.errors import ConfigError
    from hagd.tables.formats import write_files
    from hagd.tables.manifest import write_table_manifest
    from hagd.tables.terminal import print_view
    from hagd.tables.tracking import track_table
    from hagd.tables.view import view

    table, cells, _, root = _read(name, overrides)
    if not root.is_dir():
        raise ConfigError(f"paths.runs: expected a folder with runs, found no folder {root}; give --runs FOLDER")
    seen = view(table, cells)
    print_view(seen, console)
    folder = out or root / "tables"
    with disk_errors(folder):
        files = write_files(seen, folder, table.stem)
        write_table_manifest(table, cells, folder / f"{table.stem}.json")
    track_table(seen, files, next(iter(table.cells[0].configs.values())).tracking, root)
    console.print(Text("\nwritten: " + " ".join(map(str, files))), soft_wrap=True)


if __name__ == "__main__":
    main()
