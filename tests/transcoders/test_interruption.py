"""`train.py stage=transcoder`, killed at random moments and started again, gives the bits of a training left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from hagd.artifacts.codec import load_record
from hagd.transcoders.records import TranscoderSet

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "stage=transcoder",
    "task.training.steps=5",
    "transcoder.steps=300",
    "transcoder.batch_size=64",
    "transcoder.dead_fraction=0.02",  # features die within these steps, so AuxK and its counters matter
    "trainer.checkpoint_every=10",
    "trainer.threads=1",
    "tracking=disabled",
)


def start(runs: Path, *settings: str) -> subprocess.Popen[str]:
    arguments = (*SETTINGS, f"paths.runs={runs}", *settings)
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finished(runs: Path, *settings: str) -> tuple[TranscoderSet, str]:
    process = start(runs, *settings)
    said, _ = process.communicate(timeout=500)
    assert process.returncode == 0, said
    (stored,) = (runs / "artifacts" / "transcoders").iterdir()
    return load_record(TranscoderSet, stored), said


def checkpoints(runs: Path) -> set[int]:
    """Times of those that are there; not of all while one is being replaced."""
    found = set()
    with suppress(FileNotFoundError):
        for file in (runs / "artifacts" / "work").glob("transcoders-*/checkpoints/**/last.ckpt"):
            found.add(file.stat().st_mtime_ns)
    return found


def interrupted(runs: Path, sent: signal.Signals, wait: random.Random, *settings: str) -> int:
    """Exit code of a training that is killed after one to five new checkpoints and up to 50 ms."""
    process = start(runs, *settings)
    old, seen, wanted = checkpoints(runs), set[int](), wait.randint(1, 5)
    deadline = time.monotonic() + 500
    while len(seen) < wanted and process.poll() is None and time.monotonic() < deadline:
        seen |= checkpoints(runs) - old
        time.sleep(0.001)
    time.sleep(0.05 * wait.random())
    if sent == signal.SIGKILL:
        os.killpg(process.pid, sent)  # helpers, too
    else:
        process.send_signal(sent)
    process.communicate(timeout=300)
    return process.returncode


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [(), ("trainer.strategy=fsdp", "trainer.devices=2")], ids=["one process", "two processes, divided"]
)
def test_random_kills_change_no_bit(tmp_path: Path, settings: tuple[str, ...]) -> None:
    seed = random.SystemRandom().randrange(1_000_000)
    wait = random.Random(seed)
    expected, _ = finished(tmp_path / "alone", *settings)
    runs = tmp_path / "killed"
    for sent, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 128 + signal.SIGTERM)):
        assert interrupted(runs, sent, wait, *settings) == code, f"seed {seed}"
    found, said = finished(runs, *settings)
    assert "continues from" in said
    for a, b in zip(expected.transcoders, found.transcoders, strict=True):
        for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(getattr(a, name), getattr(b, name)), f"{name} of layer {a.layer}, seed {seed}"
    assert [q.prediction_r2 for q in expected.quality][:-1] == [q.prediction_r2 for q in found.quality][:-1]
