from __future__ import annotations

import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor

from hagd.config.run import TrainerConfig
from hagd.errors import ProcessEndedError
from hagd.training import termination
from hagd.training.checkpoints import StepCheckpoint
from hagd.training.fit import fit
from hagd.training.termination import StopTogether
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


@pytest.mark.parametrize(
    ("step", "left", "killed"),
    [
        (3, "there is no checkpoint yet", 0),
        (12, r"from .*c/last\.ckpt \(step 7\)", 1),
        pytest.param(3, "there is no checkpoint yet", 1, marks=pytest.mark.slow),
        pytest.param(12, r"from .*c/last\.ckpt \(step 7\)", 0, marks=pytest.mark.slow),
    ],
)
def test_the_end_of_one_process_is_one_line_in_the_others(tmp_path: Path, killed: int, step: int, left: str) -> None:
    class Killed(Toy):
        def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
            if batch[0] == step - 1 and self.global_rank == killed:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().training_step(batch, batch_idx)

    def work(rank: int) -> str:
        with pytest.raises(ProcessEndedError) as caught:
            fit(Killed(), toy_loader(40), SHARED, 40, tmp_path / "c", stage="toy")
        return str(caught.value)

    (said,) = in_processes(work, tmp_path, killed=[killed])
    assert re.fullmatch(rf"toy: expected all processes of the training .* has ended; .*{left}.*", said)
    assert (tmp_path / "c" / "last.ckpt").is_file() == (step > 7)


def test_a_process_that_ends_before_the_others_have_resumed(tmp_path: Path) -> None:
    saving, resumed = StepCheckpoint(tmp_path, 8, 0), tmp_path / "last.ckpt"
    with (
        pytest.raises(ProcessEndedError, match=f"continues from the last checkpoint, {resumed}$"),
        termination.explained_when_another_process_ends("toy", saving, resumed),
    ):
        raise RuntimeError("Connection reset by peer")


def test_steps_do_not_wait_to_hear_of_a_signal_but_the_last_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be read off `meta`."""
    told = iter([0, 0, 1])

    def late(number: Tensor) -> int:
        assert number.device.type == "meta"
        return next(told)

    monkeypatch.setattr(termination, "LateReading", lambda: late)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda value: None)

    def end_of(step: int, device: str) -> None:
        strategy = SimpleNamespace(root_device=torch.device(device))
        trainer: Any = SimpleNamespace(world_size=2, strategy=strategy, global_step=step, max_steps=9)
        stop.on_train_batch_end(trainer, Toy(), None, None, step)

    stop = StopTogether()
    end_of(1, "meta")
    end_of(2, "meta")
    with pytest.raises(SIGTERMException):
        end_of(3, "meta")
    end_of(9, "cpu")
    stop._note()
    with pytest.raises(SIGTERMException):
        end_of(9, "cpu")
