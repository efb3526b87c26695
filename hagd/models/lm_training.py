"""Training a mini model on its task."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hagd.config.model import MiniModel
from hagd.config.run import TrainerConfig
from hagd.config.task import LMTraining
from hagd.errors import ModelError
from hagd.models.language_model import LanguageModel
from hagd.models.mini import build_mini
from hagd.tasks.records import TaskData
from hagd.tasks.scoring import is_correct
from hagd.training.loader import StepLoader, batch_indices

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)


def train_lm(
    config: MiniModel,
    training: LMTraining,
    task: TaskData,
    seed: int,
    trainer: TrainerConfig,
    checkpoint_dir: Path,
    loggers: Sequence[Logger] = (),
) -> LanguageModel:
    """A mini model trained on `task.train` for a fixed number of steps; no other split influences it.

    Warns when the accuracy on all other splits is below `training.target_accuracy`.

    Raises:
        ModelError: the task has no training sequences.
        NumericalError: the loss is NaN or infinite.
    """
    from hagd.models.lm_module import MiniTraining
    from hagd.training.fit import fit

    if task.train is None or task.train.labels is None:
        raise ModelError(f"model {config.name}: task {task.name} has no training sequences; choose a symbolic task")
    tokens, labels = task.train.tokens[:, 0], task.train.labels

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = batch_indices(len(tokens), training.batch_size, seed, step)
        return tokens[rows], labels[rows]

    lm = build_mini(config, len(task.vocabulary), n_positions(task), seed)
    fit(
        MiniTraining(lm, training),
        StepLoader(batch, training.steps),
        trainer,
        training.steps,
        checkpoint_dir,
        loggers,
        metrics=("loss", "accuracy"),
        stage="lm",
        seed=seed,
    )
    trained = LanguageModel(lm.model, name=config.name)
    accuracy = held_out_accuracy(trained, task)
    log.log(
        logging.INFO if accuracy >= training.target_accuracy else logging.WARNING,
        "model %s: held-out accuracy %.4f on %s, expected at least %g%s",
        config.name,
        accuracy,
        task.name,
        training.target_accuracy,
        "" if accuracy >= training.target_accuracy else "; raise task.training.steps or task.n_train",
    )
    return trained


def n_positions(task: TaskData) -> int:
    """Longest sequence of any split."""
    splits = [task.discovery, task.selection, task.validation] + ([task.train] if task.train else [])
    return max(split.tokens.shape[-1] for split in splits)


def held_out_accuracy(lm: LanguageModel, task: TaskData, batch_size: int = 1024) -> float:
    """Share of prompts outside `task.train` that are answered correctly by the task's own rule."""
    correct = []
    for split in (task.discovery, task.selection, task.validation):
        for start in range(0, len(split), batch_size):
            prompts = split[start : start + batch_size].to(lm.device)
            with torch.no_grad():
                logits = lm.logits_at(prompts.tokens[:, 0], prompts.scored[:, 0])[:, None]
            correct.append(is_correct(logits, prompts, task.accuracy).cpu())
    return float(torch.cat(correct).double().mean())
