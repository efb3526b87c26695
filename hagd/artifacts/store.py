"""Content-addressed results under one root, computed once, written whole or not at all.

<root>/<stage>/<key>/{record.json, tensors.safetensors, meta.json}   a result
<root>/<stage>/.<key>.partial/                                       a result being written
<root>/work/<stage>-<key>/                                           scratch space from which a killed stage resumes
<root>/locks/<stage>-<key>.lock                                      held while a process computes the result
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

from filelock import FileLock, Timeout

from hagd.artifacts.codec import DamagedArtifactError, load_record, save_record
from hagd.artifacts.manifest import git_revision, peak_rss_mb, reset_peak_rss, versions
from hagd.disk import to_disk
from hagd.errors import ArtifactError
from hagd.training.processes import is_helper

R = TypeVar("R")

log = logging.getLogger(__name__)

META_FILE = "meta.json"
SECONDS_FILE = "seconds"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}


@dataclass(frozen=True)
class Stored(Generic[R]):
    """A result and where it lies.

    Attributes:
        record: the result, as read back from disk (tensors on the CPU).
        key: content address.
        path: folder of the result.
        reused: it was there already.
        seconds: time that computing it took, whenever that was; with what an interrupted attempt took whose work was
            resumed (less the last of it where the process was killed).
        peak_mb: largest resident memory in MB of the process that completed it, while it did.
    """

    record: R
    key: str
    path: Path
    reused: bool
    seconds: float
    peak_mb: float


_POLL_SECONDS = 0.2


class ArtifactStore:
    """Results of all stages under `root`; safe for any number of processes at once."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root).absolute()

    def get_or_compute(
        self,
        stage: str,
        key: str,
        cls: type[R],
        compute: Callable[[Path], R],
        provenance: Mapping[str, Any],
        joint: bool = False,
    ) -> Stored[R]:
        """The stored result of `stage` under `key`, computed first if need be.

        Args:
            stage: name of the stage; a folder below the root.
            key: from `hagd.artifacts.keys.stage_key`.
            cls: class of the result.
            compute: called with a scratch folder that outlives a kill and is deleted after success.
            provenance: written to `meta.json` (config, parents, seed); must be JSON.
            joint: all processes of a job compute this together; only the one of rank 0 stores it.

        Raises:
            ArtifactError: the disk is full or not writable, or the result cannot be stored.
        """
        path = self.root / stage / key
        origin = json.dumps(dict(provenance))  # fails before an hour of computing, not after
        with suppress(DamagedArtifactError):  # damage is dealt with below, under the lock
            stored = self._load(path, cls)
            if stored is not None:
                shutil.rmtree(self._work(path), ignore_errors=True)  # left by a kill after the rename
                return stored
        if joint and is_helper():
            return self._help(path, cls, compute)
        with self._locked(path):
            try:
                stored = self._load(path, cls)  # another process may have finished it meanwhile
            except DamagedArtifactError as error:
                log.warning("%s; computing it again", error.problem)
                with disk_errors(path):
                    shutil.rmtree(path)
                stored = None
            return stored or self._compute(path, cls, compute, json.loads(origin))

    def _help(self, path: Path, cls: type[R], compute: Callable[[Path], R]) -> Stored[R]:
        """Take part in computing, then read what the process of rank 0 stores.

        Raises:
            ArtifactError: that process ended without storing it.
        """
        work, leader = self._work(path), os.getppid()
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        compute(work)
        while (stored := self._load(path, cls)) is None:
            if os.getppid() != leader:
                raise ArtifactError(f"{path}: expected the process of rank 0 to store this, found that it ended")
            time.sleep(_POLL_SECONDS)
        return stored

    def contains(self, stage: str, key: str) -> bool:
        """Whether the result is there (it may still turn out to be damaged when it is read)."""
        return (self.root / stage / key / META_FILE).is_file()

    def busy(self, stage: str, key: str) -> bool:
        """Whether a process is computing the result at this moment."""
        file = self._lock(self.root / stage / key)
        if not file.exists():
            return False
        with disk_errors(file):
            try:
                with FileLock(file, timeout=0):
                    return False
            except Timeout:
                return True

    def _work(self, path: Path) -> Path:
        return self.root / "work" / f"{path.parent.name}-{path.name}"

    def _lock(self, path: Path) -> Path:
        return self.root / "locks" / f"{path.parent.name}-{path.name}.lock"

    @contextmanager
    def _locked(self, path: Path) -> Iterator[None]:
        file = self._lock(path)
        with disk_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(file)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                log.warning("%s %s: another process is computing it; waiting", path.parent.name, path.name)
                lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _load(self, path: Path, cls: type[R]) -> Stored[R] | None:
        with disk_errors(path):
            return self._read(path, cls) if path.exists() else None

    def _read(self, path: Path, cls: type[R]) -> Stored[R]:
        try:
            meta = json.loads((path / META_FILE).read_text())
            found = (meta["stage"], meta["key"])
            seconds, peak_mb = float(meta["seconds"]), float(meta["peak_rss_mb"])
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
            raise DamagedArtifactError(f"{path}: {META_FILE} is missing or damaged") from error
        expected = (path.parent.name, path.name)
        if found != expected:
            raise DamagedArtifactError(f"{path}: expected the result {expected}, found {found}")
        return Stored(load_record(cls, path), path.name, path, True, seconds, peak_mb)

    def _compute(self, path: Path, cls: type[R], compute: Callable[[Path], R], origin: dict[str, Any]) -> Stored[R]:
        work = self._work(path)
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        reset_peak_rss()
        try:
            with _timed(work) as seconds:
                record = compute(work)
        except Exception as error:
            if _disk_is_full(error, work):
                raise _unusable(work, error) from error
            raise
        meta = {
            **origin,
            "stage": path.parent.name,
            "key": path.name,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(seconds(), 3),
            "peak_rss_mb": round(peak_rss_mb(), 1),
            "versions": versions(),
            "git_revision": git_revision(),
        }
        with disk_errors(path):
            loaded = _publish(record, cls, meta, path)
        shutil.rmtree(work, ignore_errors=True)  # a process that finds the result deletes it, too
        return Stored(loaded, path.name, path, False, meta["seconds"], meta["peak_rss_mb"])


@contextmanager
def _timed(work: Path) -> Iterator[Callable[[], float]]:
    """Yields a clock of the seconds spent on `work`, which goes on from those of the attempts that left work there."""
    file, earlier = work / SECONDS_FILE, 0.0
    with suppress(OSError, ValueError):
        earlier = float(file.read_text())
    start = time.perf_counter()
    try:
        yield lambda: earlier + time.perf_counter() - start
    finally:
        with suppress(OSError):
            if any(work.iterdir()):
                file.write_text(str(earlier + time.perf_counter() - start))


def _publish(record: R, cls: type[R], meta: dict[str, Any], path: Path) -> R:
    """Write beside `path`, read back, flush to disk, then rename: `path` is whole whenever it exists."""
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a kill; the lock says that nobody writes it now
    try:
        save_record(record, partial)
        (partial / META_FILE).write_text(json.dumps(meta, indent=1))
        loaded = load_record(cls, partial)
        for file in (*partial.iterdir(), partial):
            to_disk(file)
        partial.rename(path)
        to_disk(path.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return loaded


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError of the block into an ArtifactError that names `path` and says what to do."""
    try:
        yield
    except OSError as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: Exception) -> ArtifactError:
    code = error.errno if isinstance(error, OSError) else None
    if code in FORBIDDEN:
        fix = "make the folder writable, or set paths.runs to one that is"
    elif code == errno.EFBIG:
        fix = "raise the limit on file sizes (ulimit -f) and run again"
    elif _disk_is_full(error, path):
        fix = "free space, or set paths.runs to another disk, and run again: finished stages are kept"
    else:
        fix = "check this path and its disk, or set paths.runs to another folder"
    return ArtifactError(f"{path}: cannot be used ({error}), {_free_mb(path):.0f} MB are free here; {fix}")


def _disk_is_full(error: Exception, path: Path) -> bool:
    """Full by its error number, or by looking: PyTorch reports a full disk as a RuntimeError without one."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return not isinstance(error, ArtifactError) and _free_mb(path) < 1


def _free_mb(path: Path) -> float:
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    return shutil.disk_usage(there).free / 2**20
