"""Checkpoints from which a killed training continues bit for bit."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException

from hagd.disk import to_disk
from hagd.training.processes import is_helper

log = logging.getLogger(__name__)

LAST = "last.ckpt"
_OLD = f"{LAST}.old"


class StepCheckpoint(Callback):
    """Writes `last.ckpt` at step boundaries only, atomically, with the random state.

    Lightning's own `save_on_exception` also saves in the middle of a step (Ctrl-C between the optimiser and the
    scheduler), from where no resume is exact. Here only SIGTERM, which Lightning raises at a boundary, saves at once;
    whatever else ends a training costs at most `every` steps.

    Attributes:
        hold: nothing is saved for now, because the state is not known to be good.
        saved: the newest checkpoint and the step after which it was made; None before the first.
    """

    def __init__(self, folder: Path, every: int, seed: int) -> None:
        self.folder = folder
        self.every = every
        self.seed = seed
        self.hold = False
        self.saved: tuple[Path, int] | None = None
        self._random_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        own = [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else []
        return {"cpu": torch.get_rng_state(), "cuda": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._random_state = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._random_state is None:
            torch.manual_seed(self.seed)
            return
        self.saved = self.folder / LAST, trainer.global_step
        torch.set_rng_state(self._random_state["cpu"].cpu())
        if self._random_state["cuda"] and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(self._random_state["cuda"][0].cpu())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step % self.every == 0 and trainer.global_step < trainer.max_steps:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if self.hold:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        partial, final = self.folder / f"{LAST}.partial", self.folder / LAST
        trainer.save_checkpoint(partial, weights_only=False)
        self.saved = final, trainer.global_step
        if not trainer.is_global_zero:
            return
        if partial.is_dir():  # a folder cannot be replaced in one step; `usable_checkpoint` knows what is between two
            for part in (*partial.iterdir(), partial):
                to_disk(part)
            old = self.folder / _OLD
            if final.exists():
                shutil.rmtree(old, ignore_errors=True)  # left by a kill
                os.replace(final, old)
            os.replace(partial, final)
            shutil.rmtree(old, ignore_errors=True)
            return
        to_disk(partial)
        os.replace(partial, final)


def usable_checkpoint(folder: Path, module: LightningModule) -> Path | None:
    """`last.ckpt` of `folder` if it can be read and fits `module`; else None, after a warning if there was one.

    A folder of parts is read by the strategy that wrote it, which refuses damaged ones: no process reads those of
    others, so none could tell that all have to start over.
    """
    path, old = folder / LAST, folder / _OLD
    if not path.exists() and old.is_dir() and not is_helper():  # killed between two renames
        os.replace(old, path)
    if path.is_dir():
        return path
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
