"""A small regression with dropout, for the tests of this folder; run as a script it trains until it is killed.

python toy.py FOLDER N_STEPS SECONDS_A_STEP
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from hagd.config.run import TrainerConfig
from hagd.training.fit import fit
from hagd.training.loader import StepLoader, batch_indices

CONFIG = TrainerConfig(checkpoint_every=7)


class Toy(LightningModule):
    """Dropout makes the weights depend on the random state, Adam and the scheduler on every step before."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.seconds = seconds
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[int, Tensor], batch_idx: int) -> dict[str, Tensor]:
        step, x = batch
        self.seen.append(step)
        if self.seconds:
            time.sleep(self.seconds)
        return {"loss": (self.net(x)[:, 0] - x.sum(-1)).pow(2).mean(), "size": x.detach().norm()}

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99), "interval": "step"}]


def toy_loader(n_steps: int) -> StepLoader[tuple[int, Tensor]]:
    """Step number and 8 of 50 rows."""
    data = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
    return StepLoader(lambda step: (step, data[batch_indices(50, 8, 0, step)]), n_steps)


def train(folder: Path, n_steps: int, module: Toy | None = None, **options: Any) -> Toy:
    """A toy trained in `folder`."""
    module = module or Toy()
    fit(module, toy_loader(n_steps), CONFIG, n_steps, folder, **options)
    return module


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), Toy(seconds=float(sys.argv[3])))
