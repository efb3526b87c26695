"""Ends of a training from outside: SIGTERM, on which all its processes stop at the same step boundary, where a
checkpoint is exact, and the end of one of its processes, without which the others cannot go on."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities.exceptions import SIGTERMException

from hagd.errors import ProcessEndedError
from hagd.training.checkpoints import StepCheckpoint
from hagd.training.device import LateReading, sent_ahead
from hagd.training.processes import another_ended


class StopTogether(Callback):
    """Raises Lightning's `SIGTERMException` in every process after a step in which any of them got the signal.

    Lightning's own handler passes the signal on to the one that was there before, which may end the process in the
    middle of a step. With several processes it also talks to the others from within the signal, between whatever they
    are exchanging at that moment, and each then stops at a boundary of its own. Neither leaves a checkpoint.

    Several CUDA devices tell of it a step late, since no step but the first and the last waits for them.
    """

    def __init__(self) -> None:
        self._received = False
        self._told = LateReading()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)  # Lightning puts back what was there before

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        received = torch.tensor(float(self._received))
        if trainer.world_size > 1:
            received = sent_ahead(received, trainer.strategy.root_device)
            torch.distributed.all_reduce(received)
        last = trainer.global_step == trainer.max_steps
        if (received if last else self._told(received)) > 0:
            raise SIGTERMException

    def _note(self, *_: object) -> None:
        self._received = True


@contextmanager
def explained_when_another_process_ends(stage: str, checkpoint: StepCheckpoint, resumed: Path | None) -> Iterator[None]:
    """Within, an exchange with a process that is gone is a `ProcessEndedError`.

    Args:
        stage: of the training.
        checkpoint: saves it.
        resumed: the checkpoint from which it continues; None: from none.
    """
    try:
        yield
    except RuntimeError as error:
        if not another_ended(error):
            raise
        left = "there is no checkpoint yet, the same command starts the training again"
        if checkpoint.saved is not None:
            left = "the same command continues from the last checkpoint, {} (step {})".format(*checkpoint.saved)
        elif resumed is not None:
            left = f"the same command continues from the last checkpoint, {resumed}"
        raise ProcessEndedError(
            f"{stage}: expected all processes of the training until its end, found that another one has ended; {left}"
        ) from error
