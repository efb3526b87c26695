from __future__ import annotations

import math
import os
import signal
from pathlib import Path

import torch
from torch import Tensor

from hagd.config.run import TrainerConfig
from hagd.training.fit import fit
from tests.processes import in_processes
from tests.training.toy import Toy, toy_loader

SHARED = TrainerConfig(devices=2, strategy="ddp", checkpoint_every=7)


def test_a_signal_does_not_save_what_is_above_its_limit(tmp_path: Path) -> None:
    """Losses are bad from step 10 on, SIGTERM comes in step 12, and they would be read in step 14."""

    class Bad(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            if batch[0] == 11 and self.global_rank == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            result = super().training_step(batch, batch_idx)
            return result | {"loss": result["loss"] * (math.nan if batch[0] >= 9 and self.global_rank == 1 else 1)}

    def work(rank: int) -> int | str | None:
        try:
            fit(Bad(), toy_loader(40), SHARED, 40, tmp_path / "c")
        except SystemExit as stop:
            return stop.code
        return None

    assert in_processes(work, tmp_path) == [128 + signal.SIGTERM] * 2
    kept = torch.load(tmp_path / "c" / "last.ckpt", weights_only=True)
    assert kept["global_step"] == 7
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
