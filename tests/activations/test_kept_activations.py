"""Activations on disk: kills, damage, other processes."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import Tensor

from hagd.activations import collect as collecting
from hagd.activations.capture import observe
from hagd.errors import NumericalError
from hagd.models.language_model import LanguageModel
from tests.activations.collected import LENGTH, N_SHARDS, batches, collected, same, sequences
from tests.builders import random_model


class PowerCut(Exception):
    pass


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One forward pass of 256 sequences each."""
    monkeypatch.setattr(collecting, "_PART_MB", 1)


def test_a_kill_costs_a_part(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    seen: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        if done > 400:
            raise PowerCut

    def count(*_: object) -> None:
        seen.append((0, 0))

    with observe(lm, "mlp", (0,), count), pytest.raises(PowerCut):
        collected(lm, tmp_path, "disk", progress=stop)
    kept = len(list(tmp_path.glob("*.safetensors")))
    assert 0 < kept < 2 * N_SHARDS
    (tmp_path / f"activations-00002-000.{2**22 + 1}.partial").write_bytes(b"half a part")  # no process has this number
    before, done = len(seen), []
    with observe(lm, "mlp", (0,), count):
        shards = collected(lm, tmp_path, "disk", progress=lambda d, t: done.append((d, t)))
        assert len(seen) - before == 2 * N_SHARDS - kept
        assert same(batches(shards), expected)
        assert done == sorted(done) and done[-1] == (700, 700)
        shards.close()
        before = len(seen)
        collected(lm, tmp_path, "disk").close()
        assert len(seen) == before
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(("memory_mb", "captures"), [(16, False), (4, True)], ids=["memory", "disk"])
def test_kept_files_are_read_once_where_memory_has_room(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]], memory_mb: int, captures: bool
) -> None:
    seen = []
    with collected(lm, tmp_path, "auto", keep=True, memory_mb=memory_mb) as shards:
        for file in tmp_path.glob("*.safetensors"):
            file.unlink()
        with observe(lm, "mlp", (0,), lambda *_: seen.append(1)):
            assert same(batches(shards), expected)
    assert bool(seen) == captures


def test_damaged_files_are_captured_again(
    lm: LanguageModel,
    tmp_path: Path,
    expected: list[tuple[Tensor, Tensor]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    shards = collected(lm, tmp_path, "disk")
    for file, damage in zip(sorted(tmp_path.glob("*.safetensors"))[1::2], (b"", b"nonsense", None), strict=True):
        whole = bytearray(file.read_bytes())
        whole[-3] ^= 4
        file.write_bytes(whole if damage is None else damage)
    assert same(batches(shards), expected)
    assert caplog.text.count("captured again") == N_SHARDS
    shards.close()
    caplog.clear()
    with collected(lm, tmp_path, "disk") as shards:
        assert same(batches(shards), expected) and not caplog.text


def test_a_file_that_another_process_is_writing_stays(lm: LanguageModel, tmp_path: Path) -> None:
    """A training replaces a damaged file while the next job of a sweep looks for what has to be captured."""
    with subprocess.Popen(["sleep", "60"]) as other:
        partial = tmp_path / f"activations-00000-000.{other.pid}.partial"
        partial.write_bytes(b"half a part")
        collected(lm, tmp_path, "disk").close()
        assert partial.exists()
        other.kill()
    collected(lm, tmp_path, "disk").close()
    assert not partial.exists()


def test_files_of_other_activations_are_not_used(
    lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    collected(lm, tmp_path, "disk", parts=(sequences(500, seed=7), sequences(200, seed=8))).close()
    with collected(lm, tmp_path, "disk") as shards:
        assert same(batches(shards), expected)
    assert "holds other activations" in caplog.text


def test_values_that_are_not_finite_are_refused_wherever_they_are_read(tmp_path: Path) -> None:
    lm = random_model(length=LENGTH)
    shards = collected(lm, tmp_path, "stream")
    shards._ahead = True
    with torch.no_grad():
        lm.mlp(1).c_proj.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="site mlp, layer 1"):
        batches(shards)
    shards.close()
    with pytest.raises(NumericalError, match="site mlp, layer 1"):
        collected(lm, tmp_path)


def test_processes_divide_the_work(lm: LanguageModel, tmp_path: Path, expected: list[tuple[Tensor, Tensor]]) -> None:
    """While another process is at a shard the others are captured, then its result is waited for."""
    done: list[int] = []
    forward = 0

    def count(*_: object) -> None:
        nonlocal forward
        forward += 1

    begun, captured = threading.Event(), threading.Event()

    def hold() -> None:
        with FileLock(tmp_path / "shard-00000.lock"):
            begun.set()
            captured.wait(20)
            collected(lm, tmp_path / "elsewhere", "disk").close()
            for file in (tmp_path / "elsewhere").glob("activations-00000-*"):
                file.rename(tmp_path / file.name)

    def watch(rows: int, total: int) -> None:
        done.append(rows)
        if len(list(tmp_path.glob("*.safetensors"))) == 2 * (N_SHARDS - 1):
            captured.set()

    thread = threading.Thread(target=hold)
    thread.start()
    assert begun.wait(20)
    with observe(lm, "mlp", (0,), count), collected(lm, tmp_path, "disk", progress=watch) as shards:
        thread.join()
        assert forward == 2 * (N_SHARDS - 1) and done == sorted(done) and done[-1] == 700
        assert same(batches(shards), expected)
