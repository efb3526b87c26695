"""Stops a training whose loss is NaN, infinite or diverging, and says where and what is left."""

from __future__ import annotations

from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from hagd.errors import NumericalError
from hagd.training.checkpoints import StepCheckpoint

BY_PART = "loss_by_part"
"""Entry of a training step's dict: losses `[P]` of parts that can fail apart, for example layers; the module's
attribute `parts` has their names."""

FACTOR, PATIENCE = 10.0, 20
"""A loss that stays above `FACTOR` times its first value (or times 1, where that is more) for `PATIENCE` steps
diverges: losses here are relative errors or nats, so it does much worse than a training that has not begun."""

_NEVER = torch.iinfo(torch.int64).max


class LossWatch(Callback):
    """Follows the loss and those of its parts.

    They are followed on their device and read when `StepCheckpoint` is about to save (on SIGTERM too), at the end, and
    on a CPU in every step: reading elsewhere would wait for the accelerator. What is above its limit is not saved, so
    the last checkpoint is from before a divergence began. Several processes read together, every `every` steps, and
    stop together.
    """

    def __init__(self, stage: str, every: int, checkpoint: StepCheckpoint) -> None:
        self.stage = stage
        self.every = every
        self.checkpoint = checkpoint
        self._limit: Tensor | None = None
        self._above, self._failed = torch.tensor(0), torch.tensor(_NEVER)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        values = outputs["loss"].detach().reshape(1).float()
        if BY_PART in outputs:
            values = torch.cat([values, outputs[BY_PART].detach().float()])
        self._follow(values, trainer.global_step)
        due = trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps
        if not due and (trainer.world_size > 1 or values.device.type != "cpu"):
            return
        found = self._read(trainer, pl_module)
        if found is not None:
            raise NumericalError(self._message(*found, trainer))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, SIGTERMException):  # in every process, at the same boundary
            self._read(trainer, pl_module)

    def _read(self, trainer: Trainer, module: LightningModule) -> tuple[int, str] | None:
        """What failed first, in any process; what is above its limit in any holds the checkpoint of all."""
        found = self._found(module)
        above = bool((self._above > 0).any())
        if trainer.world_size > 1:
            all_found: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(all_found, (found, above))
            found = min((each for each, _ in all_found if each is not None), default=None)
            above = any(each for _, each in all_found)
        self.checkpoint.hold = above
        return found

    def _follow(self, values: Tensor, step: int) -> None:
        if self._limit is None:
            self._limit = FACTOR * values.clamp(min=1).nan_to_num(1, 1)
            self._above = torch.zeros_like(values, dtype=torch.int64)
            self._failed = torch.full_like(self._above, _NEVER)
        self._above = torch.where(values <= self._limit, 0, self._above + 1)
        failed = ~values.isfinite() | (self._above >= PATIENCE)
        self._failed = torch.where(failed, self._failed.clamp(max=step), self._failed)
        self._last = values

    def _found(self, module: LightningModule) -> tuple[int, str] | None:
        """First step and what failed then; parts before the whole, which fails with any of them."""
        step = int(self._failed.min())
        if step == _NEVER:
            return None
        names: tuple[str, ...] = ("", *getattr(module, "parts", ()))
        failed = [i for i in range(len(names)) if int(self._failed[i]) == step]
        which = failed[1:] or failed
        where = "".join(f" of {names[i]}" for i in which[:1] if names[i])
        value = float(self._last[which[0]])
        how = f"has diverged to {value:.3g}" if torch.isfinite(self._last[which[0]]) else "is not finite"
        return step, f"the loss{where} {how}"

    def _message(self, step: int, what: str, trainer: Trainer) -> str:
        saved = self.checkpoint.saved
        fix = "lower the stage's learning_rate"
        if trainer.precision != "32-true":
            fix += ", or set trainer.precision=32-true"
        left = (
            "there is no checkpoint yet"
            if saved is None
            else f"the last good checkpoint is {saved[0]} (step {saved[1]})"
        )
        return f"{self.stage}: {what} at step {step} of {trainer.max_steps}; {left}; {fix}"
