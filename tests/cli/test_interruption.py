"""Ctrl-C and SIGTERM in the middle of a training: exit code, message, no half artifact, and an exact continuation."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.jobs import command, environment, run_here, tiny_overrides

LONGER = ["transcoder.steps=100", "trainer.checkpoint_every=10", "search=random"]
EXIT = {signal.SIGINT: 130, signal.SIGTERM: 143}
SAYS = {signal.SIGINT: "interrupted; finished stages are kept", signal.SIGTERM: "terminated; finished stages are kept"}


def overrides(runs: Path) -> list[str]:
    return [*tiny_overrides(runs), *LONGER]


def results(metrics: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in metrics.items() if not key.startswith(("time.", "memory."))}


def checkpoint(runs: Path, stage: str) -> bool:
    return any((runs / "artifacts" / "work").glob(f"{stage}-*/checkpoints/last.ckpt"))


@pytest.fixture(scope="module")
def uninterrupted(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    return results(run_here(tmp_path_factory.mktemp("uninterrupted"), *overrides(tiny_runs)))


@contextmanager
def signalled(runs: Path, stage: str, sent: signal.Signals) -> Iterator[None]:
    """Send this process a signal as soon as the stage has written a checkpoint."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            if checkpoint(runs, stage):
                os.kill(os.getpid(), sent)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


@pytest.mark.parametrize(
    ("stage", "sent"),
    [
        pytest.param("lm", signal.SIGINT, marks=pytest.mark.slow),
        ("transcoders", signal.SIGTERM),
        pytest.param("lm", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("transcoders", signal.SIGINT, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("undrawn")
def test_a_training_is_interrupted_and_continues(
    tiny_runs: Path,
    tmp_path: Path,
    uninterrupted: dict[str, float],
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    stage: str,
    sent: signal.Signals,
) -> None:
    if stage == "transcoders":  # its model is there
        for before in ("task", "lm", "prompts"):
            shutil.copytree(tiny_runs / "artifacts" / before, tmp_path / "artifacts" / before)
    handlers = {each: signal.getsignal(each) for each in EXIT}
    with signalled(tmp_path, stage, sent), pytest.raises(SystemExit) as stop:
        run_here(tmp_path / "first", *overrides(tmp_path))
    assert stop.value.code == EXIT[sent]
    shown = capsys.readouterr().err
    assert SAYS[sent] in shown and "Traceback" not in shown
    assert {each: signal.getsignal(each) for each in EXIT} == handlers
    assert not (tmp_path / "first" / "metrics.json").exists()
    assert not (tmp_path / "artifacts" / stage).exists() and checkpoint(tmp_path, stage)
    with caplog.at_level("INFO"):
        metrics = run_here(tmp_path / "second", *overrides(tmp_path))
    assert "continues from" in caplog.text
    assert results(metrics) == uninterrupted
    reused = json.loads((tmp_path / "second" / "manifest.json").read_text())["stages"]
    assert reused["lm"]["reused"] == (stage == "transcoders")
    assert not any((tmp_path / "artifacts" / "work").iterdir())


WHILE_PYTORCH_IS_IMPORTED = """
import os, signal, sys
from hagd.cli.launchers import _own_processes

class Interruption:
    def find_spec(self, name, *_):
        if name == "torch.autograd":
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interruption())
with _own_processes():
    import torch
"""


def test_a_job_of_a_sweep_is_interrupted_while_pytorch_is_imported() -> None:
    ended = subprocess.run([sys.executable, "-c", WHILE_PYTORCH_IS_IMPORTED], capture_output=True, text=True)
    assert ended.stderr.splitlines()[-1] == "KeyboardInterrupt"
    assert ended.returncode == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=lambda sent: sent.name)
def test_the_real_command_is_interrupted(tmp_path: Path, uninterrupted: dict[str, float], sent: signal.Signals) -> None:
    longer = [*overrides(tmp_path), "tracking=offline"]
    process = subprocess.Popen(command(*longer), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not checkpoint(tmp_path, "lm") and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(sent)
    _, shown = process.communicate(timeout=60)
    assert process.returncode == EXIT[sent] and SAYS[sent] in shown and "Traceback" not in shown
    assert not (tmp_path / "artifacts" / "lm").exists()
    assert results(run_here(tmp_path / "second", *overrides(tmp_path))) == uninterrupted
