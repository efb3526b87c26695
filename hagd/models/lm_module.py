"""The Lightning module that trains a mini model."""

from __future__ import annotations

import math
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.functional import cross_entropy

from hagd.config.task import LMTraining
from hagd.models.language_model import LanguageModel
from hagd.tasks.records import IGNORED

BETAS = (0.9, 0.98)
FINAL_RATE = 0.01
"""Share of the peak learning rate that is left at the end."""


class MiniTraining(LightningModule):
    """Next-token cross entropy at the labelled positions; AdamW, warm-up, cosine decay.

    Weight decay on matrices (embeddings included) is what turns memorisation into a general algorithm, and a
    general algorithm has a smaller circuit.
    """

    def __init__(self, lm: LanguageModel, config: LMTraining) -> None:
        super().__init__()
        self.lm = lm
        self.model = lm.model.train().requires_grad_(True)
        self.config = config

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """`batch`: tokens `[B, T]` and labels `[B, T]`, IGNORED where nothing is predicted."""
        tokens, labels = batch
        labelled = labels != IGNORED
        logits = self.lm.unembedding(self.lm.hidden(tokens)[labelled])
        targets = labels[labelled]
        accuracy = (logits.detach().argmax(-1) == targets).float().mean()
        return {"loss": cross_entropy(logits.float(), targets), "accuracy": accuracy}

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": self.config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, betas=BETAS, fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Learning rate over its peak."""
        warm = min(1.0, (step + 1) / max(self.config.warmup_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.config.steps)))
        return warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)
