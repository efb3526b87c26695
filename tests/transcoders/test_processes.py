"""Two processes that share the tokens of a batch, or divide the layers, reach what one process reaches alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hagd.artifacts.codec import load_record
from hagd.transcoders.divided import own_layers
from hagd.transcoders.records import TranscoderSet

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "stage=transcoder",
    "task.training.steps=5",
    "transcoder.steps=20",
    "transcoder.batch_size=64",
    "tracking=disabled",
    "trainer.threads=1",
)


def train(runs: Path, folder: Path, *settings: str) -> TranscoderSet:
    arguments = (*SMALL, f"paths.runs={runs}", f"hydra.run.dir={folder}", *settings)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stderr
    (stored,) = (runs / "artifacts" / "transcoders").iterdir()
    found = load_record(TranscoderSet, stored)
    for file in stored.iterdir():
        file.unlink()
    stored.rmdir()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "layers", "fsdp"])
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("transcoder.activation=jumprelu", "transcoder.skip=true"),
        ("transcoder.prediction_head=low_rank", "transcoder.head_negatives=64"),
    ],
)
def test_two_processes_train_what_one_trains(tmp_path: Path, strategy: str, settings: tuple[str, ...]) -> None:
    one = train(tmp_path / "runs", tmp_path / "one", *settings)
    two = train(tmp_path / "runs", tmp_path / "two", f"trainer.strategy={strategy}", "trainer.devices=2", *settings)
    other = train(tmp_path / "runs", tmp_path / "other", "transcoder.steps=10", *settings)
    assert [q.prediction_r2 for q in two.quality] == pytest.approx(
        [q.prediction_r2 for q in one.quality], rel=1e-3, abs=1e-3, nan_ok=True
    )
    for a, b, c in zip(one.transcoders, two.transcoders, other.transcoders, strict=True):
        torch.testing.assert_close(a.W_enc, b.W_enc, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(a.W_dec, b.W_dec, rtol=1e-3, atol=1e-4)
        assert (a.W_dec - c.W_dec).abs().max() > 1e-3


def test_divided_layers_number_alike() -> None:
    for n_layers in range(1, 9):
        for world in range(1, n_layers + 1):
            parts = [own_layers(n_layers, rank, world) for rank in range(world)]
            assert [layer for part in parts for layer in part] == list(range(n_layers))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
