"""What both entry points share: from Hydra's composed configuration to a job with clean errors and exit codes."""

from __future__ import annotations

import logging
import math
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from hagd.cli.launchers import launched_job
from hagd.cli.sweep_jobs import swept_overrides
from hagd.cli.terminal import never_fail_to_print
from hagd.tracking.sweep_job import SweepJob

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from hagd.config.run import StagesConfig
    from hagd.pipeline.finished import FinishedJob

S = TypeVar("S", bound="StagesConfig")

_RESULTS = ("metrics.json", "reused.json", "stopped.json", "manifest.json", "tracking.json", "report.html")
"""What sweeps and tables read of a job; without the first, what is left of the others is no finished job."""


def run_job(
    composed: DictConfig, schema: type[S], job: Callable[[S, Path, SweepJob | None], dict[str, float]]
) -> dict[str, float]:
    """Validate the configuration and run the job in its Hydra folder; a sweep does not repeat what has finished before.

    A problem that the user can act on is printed as its message alone; the exit code is 1. In a sweep the other
    jobs go on. Ctrl-C exits with 130, SIGTERM with 143; finished stages and checkpoints are kept either way.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from hagd.config.load import load_config, plain
    from hagd.errors import HagdError

    never_fail_to_print()  # in a launcher's worker, too
    hydra = HydraConfig.get()
    folder = Path(hydra.runtime.output_dir)
    sweep = hydra.mode == RunMode.MULTIRUN
    (folder / "error.txt").unlink(missing_ok=True)  # of an attempt that a cluster requeued
    previous = signal.signal(signal.SIGTERM, _terminate) if _in_main_thread() else None
    # A log file on a full disk must not bury the message that says so under a traceback a line.
    raises, logging.raiseExceptions = logging.raiseExceptions, False
    try:
        try:
            config = load_config(schema, plain(composed))
        except HagdError:
            if sweep:
                _remove_results(folder)
            raise
        if not sweep:
            return _reuse_or_run(config, job, folder, None)
        of_sweep = SweepJob(Path(hydra.sweep.dir).name, swept_overrides(hydra))
        with launched_job(hydra, folder, job.__module__) if _in_main_thread() else nullcontext():
            return _reuse_or_run(config, job, folder, of_sweep)
    except HagdError as error:
        _fail(str(error), folder, sweep)
    except OSError as error:
        where, why = error.filename or folder, error.strerror or error
        _fail(f"{where}: {why}; free space or set paths.runs to a folder that can be written", folder, sweep)
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept, the same command continues", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except SystemExit as stop:
        if stop.code == 128 + signal.SIGTERM:
            print("terminated; finished stages are kept, the same command continues", file=sys.stderr)
        raise
    except Exception as error:
        _write_error(folder, f"{type(error).__name__}: {error}")
        logging.getLogger(__name__).error("job in %s failed", folder)
        raise
    finally:
        logging.raiseExceptions = raises
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def objective(metrics: dict[str, float], wanted: str | None, otherwise: Sequence[str]) -> float:
    """What a sweeper optimises: the metric `wanted`, or the first of `otherwise` that there is; NaN without any."""
    names = otherwise if wanted is None else (wanted,)
    return next((metrics[name] for name in names if name in metrics), math.nan)


def _known_metric(wanted: str | None, metrics: dict[str, float]) -> None:
    from hagd.config.problems import nearest
    from hagd.errors import ConfigError

    if wanted is not None and wanted not in metrics:
        near = nearest(wanted, metrics)
        raise ConfigError(
            f"optimized_metric: expected a key of metrics.json, found {wanted}"
            + (f"; did you mean {near}?" if near else "; choose one of those in the run folder")
        )


def _reuse_or_run(
    config: S, job: Callable[[S, Path, SweepJob | None], dict[str, float]], folder: Path, of_sweep: SweepJob | None
) -> dict[str, float]:
    from hagd.pipeline.finished import refer_to, remember_finished

    finished = _finished_before(config, folder, sweep=of_sweep is not None)
    if finished is not None:
        refer_to(finished, folder)
        print(f"finished before: {finished.folder}")
        _known_metric(config.optimized_metric, finished.metrics)
        return finished.metrics
    metrics = job(config, folder, of_sweep)
    remember_finished(config, folder)
    _known_metric(config.optimized_metric, metrics)
    return metrics


def _finished_before(config: StagesConfig, folder: Path, sweep: bool) -> FinishedJob | None:
    """In a sweep, the job that has finished before; what any other one left in `folder` is removed."""
    from hagd.pipeline.finished import finished_job, may_be_overwritten
    from hagd.training.processes import is_helper

    found = finished = None
    try:
        found = finished_job(config)
        if sweep and found is not None and not may_be_overwritten(found, folder):
            finished = found
    finally:
        holds_it = found is not None and found.folder == folder.resolve()
        if not holds_it and not is_helper():  # the process that it helps may have begun to write
            _remove_results(folder)
    return finished


def _remove_results(folder: Path) -> None:
    for name in _RESULTS:
        (folder / name).unlink(missing_ok=True)


def _fail(message: str, folder: Path, sweep: bool) -> NoReturn:
    """End the job with a message alone; the others of a sweep go on."""
    from hydra.errors import CompactHydraException

    _write_error(folder, message)
    print(f"error: {message}", file=sys.stderr)
    if sweep:  # Hydra raises it again after the last job, and prints no traceback of its own exceptions
        raise CompactHydraException(message) from None
    sys.exit(1)


def _write_error(folder: Path, text: str) -> None:
    """`error.txt` for the table of a sweep; a full disk must not hide the error itself."""
    with suppress(OSError):
        (folder / "error.txt").write_text(f"{text}\n", encoding="utf-8")


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def _in_main_thread() -> bool:
    import threading

    return threading.current_thread() is threading.main_thread()
