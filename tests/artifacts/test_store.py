from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from hagd.artifacts.store import ArtifactStore, Stored
from hagd.errors import ArtifactError

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Result:
    values: Tensor
    note: str


def result(n: int = 100) -> Result:
    return Result(torch.arange(n), "made")


def stored(root: Path, n: int = 100) -> Stored[Result]:
    return ArtifactStore(root).get_or_compute("stage", "k0", Result, lambda work: result(n), {"seed": 3})


def entries(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.parent.name != "locks")


WHOLE = ["locks", "stage", "stage/k0", *(f"stage/k0/{n}" for n in ("meta.json", "record.json", "tensors.safetensors"))]


def test_computed_once_then_reused(tmp_path: Path) -> None:
    first = stored(tmp_path)
    store = ArtifactStore(tmp_path)
    second = store.get_or_compute("stage", "k0", Result, lambda work: pytest.fail("computed twice"), {"seed": 3})
    assert (first.reused, second.reused) == (False, True)
    assert torch.equal(first.record.values, second.record.values) and second.record.note == "made"
    assert (second.seconds, second.peak_mb) == (first.seconds, first.peak_mb)
    assert entries(tmp_path) == [*WHOLE, "work"]


def test_a_result_that_is_being_computed_is_busy(tmp_path: Path) -> None:
    store, seen = ArtifactStore(tmp_path), []

    def compute(work: Path) -> Result:
        seen.append(ArtifactStore(tmp_path).busy("stage", "k0"))
        return result()

    seen.append(store.busy("stage", "k0"))
    store.get_or_compute("stage", "k0", Result, compute, {})
    assert [*seen, store.busy("stage", "k0"), store.busy("stage", "k1")] == [False, True, False, False]


def test_meta_tells_where_a_result_comes_from(tmp_path: Path) -> None:
    first = stored(tmp_path)
    meta = json.loads((first.path / "meta.json").read_text())
    assert meta["seed"] == 3 and meta["key"] == "k0" and meta["stage"] == "stage"
    assert meta["versions"]["torch"] and meta["created"] and meta["peak_rss_mb"] > 10
    assert meta["seconds"] == first.seconds


def test_provenance_that_is_no_json_fails_before_computing(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="JSON"):
        ArtifactStore(tmp_path).get_or_compute("s", "k", Result, lambda work: pytest.fail("ran"), {"a": object()})


def test_damaged_result_is_computed_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("tensors.safetensors", "record.json", "meta.json"):
        file = stored(tmp_path).path / name
        file.write_bytes(file.read_bytes()[:-5])
        caplog.clear()
        again = stored(tmp_path)
        assert not again.reused and torch.equal(again.record.values, torch.arange(100))
        assert str(again.path) in caplog.text and "; computing it again" in caplog.text
        assert "delete this folder" not in caplog.text
        assert stored(tmp_path).reused


def test_result_moved_to_another_key_is_not_believed(tmp_path: Path) -> None:
    first = stored(tmp_path)
    first.path.rename(first.path.with_name("k1"))
    other = ArtifactStore(tmp_path).get_or_compute("stage", "k1", Result, lambda work: result(7), {})
    assert len(other.record.values) == 7


def test_failing_stage_keeps_its_work_for_resuming(tmp_path: Path) -> None:
    def compute(work: Path) -> Result:
        done = work / "half.txt"
        if not done.exists():
            done.write_text("half")
            raise KeyboardInterrupt
        return Result(torch.zeros(1), done.read_text())

    store = ArtifactStore(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        store.get_or_compute("stage", "k0", Result, compute, {})
    left = ["work/stage-k0", "work/stage-k0/half.txt", "work/stage-k0/seconds"]
    assert entries(tmp_path) == ["locks", "work", *left]
    assert store.get_or_compute("stage", "k0", Result, compute, {}).record.note == "half"
    assert entries(tmp_path) == [*WHOLE, "work"]


@pytest.mark.parametrize("keeps_work", [True, False])
def test_seconds_are_those_of_all_attempts_on_the_same_work(tmp_path: Path, keeps_work: bool) -> None:
    pauses = iter((0.3, 0.3, 0.1))

    def compute(work: Path) -> Result:
        if keeps_work:
            (work / "checkpoint").touch()
        pause = next(pauses)
        time.sleep(pause)
        if pause == 0.3:
            raise KeyboardInterrupt
        return result()

    store = ArtifactStore(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            store.get_or_compute("stage", "k0", Result, compute, {})
    computed = store.get_or_compute("stage", "k0", Result, compute, {})
    assert (computed.seconds >= 0.7) == keeps_work and computed.seconds >= 0.1
    assert stored(tmp_path).seconds == computed.seconds


def test_work_that_another_process_deletes_first_is_no_error(tmp_path: Path) -> None:
    def compute(work: Path) -> Result:
        work.rmdir()
        return result()

    assert not ArtifactStore(tmp_path).get_or_compute("stage", "k0", Result, compute, {}).reused
    assert entries(tmp_path) == [*WHOLE, "work"]


def test_errors_of_the_stage_are_passed_on(tmp_path: Path) -> None:
    def compute(work: Path) -> Result:
        raise FileNotFoundError("data.json")

    with pytest.raises(FileNotFoundError, match=r"data\.json"):
        ArtifactStore(tmp_path).get_or_compute("stage", "k0", Result, compute, {})


def test_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("")
    with pytest.raises(ArtifactError, match=r"runs.*paths\.runs"):
        stored(tmp_path / "runs")


ATTEMPTS = 3
SCRIPT = """
import os, resource, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
import torch
from torch import Tensor
from hagd.artifacts.store import ArtifactStore
from hagd.errors import HagdError

@dataclass(frozen=True)
class Result:
    values: Tensor
    note: str

def compute(work):
    (work / f"ran-{os.getpid()}").write_text("")
    (ROOT.parent / f"ran-{os.getpid()}").write_text("")
    print("computing", flush=True)
    time.sleep(SLEEP)
    return Result(torch.arange(SIZE), "made")

def main():
    try:
        stored = ArtifactStore(ROOT).get_or_compute("stage", "k0", Result, compute, {})
        print("reused" if stored.reused else "computed", int(stored.record.values.sum()), flush=True)
    except HagdError as error:
        print("error:", error)
"""


def python(root: Path, size: int = 100, sleep: float = 0, before: str = "") -> subprocess.Popen[str]:
    head = f"from pathlib import Path\nROOT, SIZE, SLEEP = Path({str(root)!r}), {size}, {sleep}\n"
    code = head + SCRIPT + textwrap.dedent(before) + "\nmain()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.slow
def test_two_processes_compute_once_and_the_second_says_that_it_waits(tmp_path: Path) -> None:
    processes = [python(tmp_path / "runs", sleep=2) for _ in range(2)]
    outputs = [process.communicate(timeout=120) for process in processes]
    words = sorted(out.split()[-2] for out, _ in outputs)
    assert words == ["computed", "reused"], outputs
    assert len(list(tmp_path.glob("ran-*"))) == 1
    assert sum("waiting" in err for _, err in outputs) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_at_random_moments_of_saving_then_completes(tmp_path: Path, number: signal.Signals) -> None:
    size, random = 8_000_000, Random(0)
    for attempt in range(ATTEMPTS):
        root = tmp_path / str(attempt)
        process = python(root, size)
        assert process.stdout is not None
        process.stdout.readline()  # computing
        while not (root / "stage" / ".k0.partial").exists() and process.poll() is None:
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.1))
        process.send_signal(number)
        process.communicate(timeout=60)
        final = root / "stage" / "k0"
        assert not final.exists() or len(list(final.iterdir())) == 3
    for attempt in range(ATTEMPTS):
        out, err = python(tmp_path / str(attempt), size).communicate(timeout=60)
        assert out.split()[-1] == str(size * (size - 1) // 2), err
        assert entries(tmp_path / str(attempt)) == [*WHOLE, "work"]


@pytest.mark.slow
def test_limit_on_file_sizes_leaves_nothing_half(tmp_path: Path) -> None:
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))"
    out, err = python(tmp_path / "runs", 100_000, before=limit).communicate(timeout=60)
    assert "error:" in out and "stage/k0" in out and "ulimit" in out, (out, err)
    assert entries(tmp_path / "runs" / "stage") == []
    out, _ = python(tmp_path / "runs", 100_000).communicate(timeout=60)
    assert out.split()[-2] == "computed"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB; needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_while_saving(small_disk: Path) -> None:
    with pytest.raises(ArtifactError, match=r"stage/k0: cannot be used.*MB are free here; free space"):
        stored(small_disk, 1_000_000)
    assert entries(small_disk / "stage") == []
    assert not stored(small_disk, 100).reused  # the next run needs no cleaning up


def test_full_disk_while_computing(small_disk: Path) -> None:
    def compute(work: Path) -> Result:
        torch.save(torch.zeros(1_000_000), work / "checkpoint.pt")
        return result()

    with pytest.raises(ArtifactError, match=r"work/stage-k0: cannot be used.*free space"):
        ArtifactStore(small_disk).get_or_compute("stage", "k0", Result, compute, {})


def test_read_only_disk(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    stored(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with caplog.at_level(logging.WARNING):
        assert stored(small_disk).reused  # reading needs no lock
        with pytest.raises(ArtifactError, match=r"make the folder writable, or set paths\.runs"):
            ArtifactStore(small_disk).get_or_compute("stage", "k1", Result, lambda work: result(), {})
    assert not caplog.records
