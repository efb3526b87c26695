"""Checkpoints from which a killed training continues bit for bit, and the watch for non-finite losses."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from hagd.errors import NumericalError

log = logging.getLogger(__name__)

LAST = "last.ckpt"


class StepCheckpoint(Callback):
    """Writes `last.ckpt` at step boundaries only, atomically, with the random state.

    Lightning's own `save_on_exception` also saves in the middle of a step (Ctrl-C between the optimiser and the
    scheduler), from where no resume is exact. Here only SIGTERM, which Lightning raises at a boundary, saves at once;
    whatever else ends a training costs at most `every` steps.
    """

    def __init__(self, folder: Path, every: int, seed: int) -> None:
        self.folder = folder
        self.every = every
        self.seed = seed
        self._random_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {"cpu": torch.get_rng_state(), "cuda": cuda}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random_state is None:
            torch.manual_seed(self.seed)
            return
        torch.set_rng_state(self._random_state["cpu"].cpu())
        if len(self._random_state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._random_state["cuda"]])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, final = self.folder / f"{LAST}.partial", self.folder / LAST
        trainer.save_checkpoint(partial, weights_only=False)
        if not trainer.is_global_zero:
            return
        if partial.is_dir():  # sharded strategies write a folder, which cannot be replaced in one step
            shutil.rmtree(final, ignore_errors=True)
        else:
            with partial.open("rb") as file:
                os.fsync(file.fileno())
        os.replace(partial, final)


class FiniteLoss(Callback):
    """Stops a training whose loss is NaN or infinite, naming the first such step.

    The loss is watched on its device and read when `StepCheckpoint` is about to save, at the end, and every
    `every` steps: reading it each step would wait for the accelerator each step.
    """

    def __init__(self, stage: str, every: int) -> None:
        self.stage = stage
        self.every = every
        self._first: Tensor | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss: Tensor = outputs["loss"]
        step = trainer.global_step
        if self._first is None:
            self._first = torch.full((), torch.inf, device=loss.device, dtype=torch.float64)
        self._first = torch.where(loss.isfinite(), self._first, self._first.clamp(max=step))
        if (loss.device.type == "cpu" or step % self.every == 0 or step == trainer.max_steps) and (
            self._first.isfinite()
        ):
            raise NumericalError(
                f"{self.stage}: the loss is not finite at step {int(self._first)} of {trainer.max_steps}; "
                "lower the stage's learning_rate, or set trainer.precision=32-true"
            )


def usable_checkpoint(folder: Path, module: LightningModule) -> Path | None:
    """`last.ckpt` of `folder` if it can be read and fits `module`; else None, after a warning if there was one."""
    path = folder / LAST
    if path.is_dir():
        return path  # sharded; read by the strategy that wrote it
    if not path.is_file():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        fits = {name: value.shape for name, value in stored.items()} == {
            name: value.shape for name, value in module.state_dict().items()
        }
    except Exception as error:  # a damaged file raises whatever its first bad byte leads to
        log.warning("checkpoint %s cannot be read (%s); training starts from the beginning", path, type(error).__name__)
    else:
        if fits:
            return path
        log.warning("checkpoint %s is of another model; training starts from the beginning", path)
    path.unlink()
    return None
