from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from hagd.config.model import Architecture, MiniModel
from hagd.config.run import TrainerConfig
from hagd.config.task import LMTraining, ModularArithmetic, Parity
from hagd.errors import ModelError
from hagd.models.lm_training import held_out_accuracy, n_positions, train_lm
from hagd.models.mini import build_mini, mini_state
from hagd.tasks.build import build_task
from hagd.tasks.records import TaskData


def small_task() -> TaskData:
    """7 × 7 sums, most of them in training."""
    config = ModularArithmetic(p=7, n_train=36, n_discovery=5, n_selection=4, n_validation=4)
    return build_task(config, None, seed=0)


def model(architecture: Architecture = "gpt2") -> MiniModel:
    return MiniModel(architecture=architecture, d_model=32, n_heads=2, d_mlp=64)


def training(steps: int) -> LMTraining:
    return LMTraining(steps=steps, batch_size=32, warmup_steps=5, learning_rate=0.01, weight_decay=0.1)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", pytest.param("llama", marks=pytest.mark.slow)])
def test_training_fits_the_training_sequences(tmp_path: Path, architecture: Architecture) -> None:
    task = small_task()
    lm = train_lm(model(architecture), training(120), task, 0, TrainerConfig(), tmp_path / "c")
    assert task.train is not None and task.train.labels is not None
    best = lm.logits_at(task.train.tokens[:, 0], torch.tensor([[2]]).expand(36, 1)).argmax(-1)
    assert torch.equal(best[:, 0], task.train.labels[:, 2])
    assert not lm.model.training and not any(p.requires_grad for p in lm.model.parameters())


def test_the_same_seed_gives_the_same_model(tmp_path: Path) -> None:
    def train(seed: int) -> dict[str, torch.Tensor]:
        return mini_state(train_lm(model(), training(6), small_task(), seed, TrainerConfig(), tmp_path / "c"))

    states = [train(seed) for seed in (1, 1, 2)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not all(torch.equal(states[0][name], states[2][name]) for name in states[0])


def test_too_low_accuracy_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hagd"):
        train_lm(model(), training(1), small_task(), 0, TrainerConfig(), tmp_path / "c")
    (record,) = caplog.records
    assert "held-out accuracy" in record.getMessage() and "expected at least 0.99" in record.getMessage()


def test_held_out_accuracy_counts_all_splits_but_training() -> None:
    task = build_task(Parity(length=4, n_train=4, n_discovery=4, n_selection=2, n_validation=6), None, seed=1)
    lm = build_mini(model(), len(task.vocabulary), n_positions(task), seed=0)
    rows = torch.cat([split.tokens[:, 0] for split in (task.discovery, task.selection, task.validation)])
    parity = rows[:, 1:].sum(-1) % 2  # behind the start token
    best = lm.logits_at(rows, torch.full((12, 1), 4)).argmax(-1)[:, 0]
    assert held_out_accuracy(lm, task, batch_size=5) == pytest.approx((best == 2 + parity).double().mean().item())


def test_a_task_without_training_sequences_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(ModelError, match="no training sequences"):
        train_lm(model(), training(1), replace(small_task(), train=None), 0, TrainerConfig(), tmp_path / "c")
