"""What a job of a sweep owes to its launcher: an end with it, requeueing, and several processes of its own."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hydra.conf import HydraConf

_PARENT = os.getppid()
"""Of this process; a worker imports this module while the sweep that started it is alive."""

_PLACE = {"MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"}
"""Variables in which Lightning tells the processes of a training where they are."""

_GRACE_SECONDS = 60
_TERMINATED = 128 + signal.SIGTERM


@contextmanager
def launched_job(hydra: HydraConf, folder: Path, entry: str) -> Iterator[None]:
    """For the duration of one job of a sweep; to be entered in the main thread.

    - joblib: the worker ends when the sweep that started it was killed.
    - submitit: before a time limit or a preemption the running training writes a checkpoint, then the job is requeued.
    - Trainings of several processes: the others run this job, not the sweep.

    Args:
        hydra: Hydra's own configuration.
        folder: the job's.
        entry: module of the command (`hagd.cli.extract`).
    """
    with ExitStack() as stack:
        stack.enter_context(_commanded_alone(hydra, folder, entry))
        stack.enter_context(_own_processes())
        if str(hydra.launcher._target_).endswith("JoblibLauncher"):
            stack.enter_context(_ended_with_the_sweep())
        if "SUBMITIT_EXECUTOR" in os.environ:
            stack.enter_context(_requeued_after_checkpoint())
        yield


@contextmanager
def _commanded_alone(hydra: HydraConf, folder: Path, entry: str) -> Iterator[None]:
    """Lightning starts a training's other processes with the command of this one, which must not be the sweep's."""
    from omegaconf import open_dict, read_write

    main = sys.modules["__main__"]
    command, spec = sys.argv, main.__spec__
    node: Any = hydra  # a configuration node, which only claims to be its schema
    with read_write(node), open_dict(node):
        hydra.run.dir = str(folder)
    sys.argv = [entry, *hydra.overrides.task]
    main.__spec__ = find_spec(entry)
    try:
        yield
    finally:
        sys.argv, main.__spec__ = command, spec


@contextmanager
def _own_processes() -> Iterator[None]:
    """Processes that shared this job's trainings end with it; the next job in this process starts its own."""
    new = _PLACE - os.environ.keys()
    try:
        yield
    finally:
        torch = sys.modules.get("torch")  # None, too, where its import was interrupted: a second one would fail
        if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name in new & os.environ.keys():
            del os.environ[name]


@contextmanager
def _ended_with_the_sweep() -> Iterator[None]:
    over = threading.Event()

    def watch() -> None:
        while not over.wait(1):
            if os.getppid() != _PARENT:
                os.kill(os.getpid(), signal.SIGTERM)  # a training writes its checkpoint
                over.wait(_GRACE_SECONDS)
                os._exit(_TERMINATED)  # the worker itself would wait for the next job

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


@contextmanager
def _requeued_after_checkpoint() -> Iterator[None]:
    """Submitit's signal acts as SIGTERM first; its own handler, which requeues and exits, follows."""
    number = signal.Signals[f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}"]
    asked = False

    def stop(*_: Any) -> None:
        nonlocal asked
        asked = True
        signal.raise_signal(signal.SIGTERM)

    requeue = signal.signal(number, stop)
    try:
        yield
    except SystemExit:
        if asked and callable(requeue):
            requeue(number, None)
        raise
    finally:
        signal.signal(number, requeue)
