"""The Lightning module that trains the scorer."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from pytorch_lightning import LightningModule
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from hagd.config.run import GNNConfig
from hagd.search.scorer.network import CircuitScorer

WARMUP = 0.05
"""Share of the steps with rising learning rate."""
FINAL_RATE = 0.02
"""Share of the peak learning rate that is left at the end."""


class GraphBatch(NamedTuple):
    """One graph: the tensors of a `ScoredGraph`, and the standardised ranks of its target `[n_candidates]`."""

    inputs: Tensor
    edge_index: Tensor
    edge_type: Tensor
    edge_attr: Tensor
    target: Tensor
    target_ranks: Tensor


class ScorerTraining(LightningModule):
    """Binary cross entropy on soft targets; AdamW, warm-up, cosine decay."""

    def __init__(self, network: CircuitScorer, config: GNNConfig, n_steps: int) -> None:
        super().__init__()
        self.network = network
        self.config = config
        self.n_steps = n_steps

    def training_step(self, batch: GraphBatch, batch_idx: int) -> dict[str, Tensor]:
        *graph, target, target_ranks = batch
        logits = self.network(*graph, len(target))
        return {
            "loss": binary_cross_entropy_with_logits(logits, target),
            "correlation": correlation_with_ranks(logits.detach(), target_ranks),
        }

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Learning rate over its peak."""
        warm = min(1.0, (step + 1) / max(WARMUP * self.n_steps, 1))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.n_steps)))
        return warm * (FINAL_RATE + (1 - FINAL_RATE) * cosine)


def correlation_with_ranks(scores: Tensor, standardised_ranks: Tensor) -> Tensor:
    """Spearman correlation without waiting for the accelerator; equal scores get ranks in arbitrary order."""
    ranks = scores.argsort().argsort().to(standardised_ranks.dtype)
    ranks = ranks - ranks.mean()
    return torch.dot(ranks / ranks.norm().clamp(min=1e-12), standardised_ranks)
