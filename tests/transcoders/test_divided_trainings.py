"""Trainings of which each of two processes holds a part: their checkpoints and what they log."""

from __future__ import annotations

import csv
import os
import shutil
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, Logger
from torch import Tensor

from hagd.config.run import TrainerConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.errors import ConfigError
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.training.processes import dividing_layers, rank_and_world
from hagd.transcoders.divided import DividedTraining
from hagd.transcoders.initialise import initialise
from hagd.transcoders.joint import JointTraining
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.sharded import ShardedTraining
from tests.processes import in_processes

Strategy = Literal["layers", "fsdp"]

LAYERS, TOKENS, D, STEPS = 3, 32, 8, 6
CONFIG = TranscoderConfig(k=4, expansion=5, steps=STEPS, batch_size=TOKENS, dead_fraction=0.1)
KINDS: dict[Strategy, type[JointTraining]] = {"layers": DividedTraining, "fsdp": ShardedTraining}

pytestmark = pytest.mark.filterwarnings("ignore:.*returned a view tensor", "ignore:.*weights_only")


class PowerCut(Exception):
    pass


def tokens() -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(LAYERS, STEPS * TOKENS, D, generator=g)
    return x, (x @ torch.randn(LAYERS, D, D, generator=g)).relu()


def loader(cut: int | None = None) -> StepLoader[tuple[Tensor, Tensor]]:
    """A power cut before the step `cut`."""
    x, y = tokens()

    def batch(step: int) -> tuple[Tensor, Tensor]:
        if step == cut:
            raise PowerCut
        rank, world = rank_and_world()
        rows = slice(step * TOKENS + rank, (step + 1) * TOKENS, world)
        return x[:, rows], y[:, rows]

    return StepLoader(batch, STEPS)


def train(
    strategy: Strategy, folder: Path, cut: int | None = None, loggers: Sequence[Logger] = ()
) -> dict[str, Tensor]:
    """Weights of all layers; a checkpoint after every second step."""
    x, y = tokens()
    module = KINDS[strategy](CONFIG, 0, Scaling.of(x), Scaling.of(y), (x, y))
    trainer = TrainerConfig(devices=2, strategy=strategy, checkpoint_every=2)
    with dividing_layers() if strategy == "layers" else nullcontext():
        fit(module, loader(cut), trainer, STEPS, folder, loggers, joint=True)
    return dict(module.whole().state_dict())


@dataclass(frozen=True)
class Cut:
    """A training with a power cut: the folder of its checkpoint, and the files that its first process had synced."""

    strategy: Strategy
    folder: Path
    synced: set[int]


@pytest.fixture(scope="module", params=KINDS)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Cut:
    folder, sync, synced = tmp_path_factory.mktemp("cut"), os.fsync, set[int]()

    def watched(descriptor: int) -> None:
        sync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def work(rank: int) -> set[int]:
        pytest.MonkeyPatch().setattr(os, "fsync", watched)
        with suppress(PowerCut):
            train(request.param, folder / "c", cut=5)
        return synced

    by_first, _ = in_processes(work, folder)
    assert (folder / "c" / "last.ckpt").is_dir()
    return Cut(request.param, folder / "c", by_first)


def test_a_checkpoint_and_its_parts_are_on_the_disk(cut: Cut) -> None:
    last = cut.folder / "last.ckpt"
    assert {path.stat().st_ino for path in (last, *last.iterdir())} <= cut.synced


def test_a_power_cut_changes_no_bit(tmp_path: Path, cut: Cut) -> None:
    shutil.copytree(cut.folder, tmp_path / "cut")

    def work(rank: int) -> bool:
        expected = train(cut.strategy, tmp_path / "alone")
        found = train(cut.strategy, tmp_path / "cut")
        return all(torch.equal(found[name], expected[name]) for name in expected)

    assert in_processes(work, tmp_path) == [True, True]


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_part_is_named_with_what_to_do(tmp_path: Path, cut: Cut, damage: str) -> None:
    """Every process says so, also those whose part is good."""
    last = shutil.copytree(cut.folder, tmp_path / "c") / "last.ckpt"
    (part,) = last.glob("process-1-*.ckpt" if cut.strategy == "layers" else "__1_*.distcp")
    if damage == "truncated":
        part.write_bytes(part.read_bytes()[:1000])
    else:
        part.unlink()

    def work(rank: int) -> str | None:
        try:
            train(cut.strategy, tmp_path / "c")
        except ConfigError as error:
            return str(error)
        return None

    for said in in_processes(work, tmp_path):
        assert said is not None and str(last) in said and said.endswith("to start over")


def test_what_is_logged_is_of_all_layers(tmp_path: Path) -> None:
    """What one process logs that trains them all."""

    def logger(name: str) -> CSVLogger:
        return CSVLogger(tmp_path, name, version="", flush_logs_every_n_steps=1)

    def logged(name: str) -> dict[str, float]:
        (row,) = csv.DictReader((tmp_path / name / "metrics.csv").read_text().splitlines())
        return {name: float(value) for name, value in row.items() if name != "training/memory_mb"}

    def work(rank: int) -> None:
        train("layers", tmp_path / "c", loggers=[] if rank else [logger("divided")])

    in_processes(work, tmp_path)
    x, y = tokens()
    scalings = Scaling.of(x), Scaling.of(y)
    stacked = StackedTranscoders(CONFIG, LAYERS, D, seed=0)
    initialise(stacked, scalings[0](x), scalings[1](y))
    fit(TranscoderTraining(stacked, *scalings), loader(), TrainerConfig(), STEPS, tmp_path / "d", [logger("alone")])
    expected = logged("alone")
    assert logged("divided") == pytest.approx(expected, rel=1e-3)
    assert expected["training/dead"] > 0
    assert {f"training/loss_by_part/layer {i}" for i in range(LAYERS)} < expected.keys()
