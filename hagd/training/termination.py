"""SIGTERM in a training of several processes: all stop at the same step boundary."""

from __future__ import annotations

import signal
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException


class StopTogether(Callback):
    """Raises Lightning's `SIGTERMException` in every process after a step in which any of them got the signal.

    Lightning's own handler talks to the other processes from within the signal, between whatever they are exchanging
    at that moment, and each process then stops at a boundary of its own; neither leaves a checkpoint.
    """

    def __init__(self) -> None:
        self._received = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            signal.signal(signal.SIGTERM, self._note)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.world_size > 1:
            received = torch.tensor(float(self._received), device=trainer.strategy.root_device)
            torch.distributed.all_reduce(received)
            if received > 0:
                raise SIGTERMException

    def _note(self, *_: object) -> None:
        self._received = True
