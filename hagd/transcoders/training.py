"""Trains the dictionaries of all layers in one pass over the activations, as a Lightning module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from hagd.activations.shards import ActivationShards
from hagd.config.run import TrainerConfig
from hagd.config.stages import TranscoderConfig
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.records import Transcoder

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

_INITIAL_TOKENS = 8192
_BETAS = (0.9, 0.999)


class TranscoderTraining(pl.LightningModule):
    """Minimises Eq. 4 (`StackedTranscoders.losses`) with Adam; warm-up, constant rate, linear decay."""

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    def __init__(self, stacked: StackedTranscoders, x_scaling: Scaling, y_scaling: Scaling) -> None:
        super().__init__()
        self.stacked = stacked
        for name, value in (
            ("x_mean", x_scaling.mean),
            ("x_scale", x_scaling.scale),
            ("y_mean", y_scaling.mean),
            ("y_scale", y_scaling.scale),
        ):
            self.register_buffer(name, value)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """One step on raw tokens `[L, B, d]` twice."""
        x = Scaling(self.x_mean, self.x_scale)(batch[0])
        y = Scaling(self.y_mean, self.y_scale)(batch[1])
        losses = self.stacked.losses(x, y)
        return {
            "loss": losses.total,
            "fvu": losses.fvu.detach(),
            "prediction": losses.prediction.detach(),
            "sparsity": losses.sparsity.detach(),
            "dead": self.stacked.dead().float().mean(),
        }

    def configure_optimizers(self) -> Any:
        """Adam and its schedule, a function of the step alone."""
        config = self.stacked.config
        optimiser = torch.optim.Adam(self.stacked.parameters(), lr=config.learning_rate, betas=_BETAS, fused=True)

        def rate(step: int) -> float:
            rising = (step + 1) / max(config.warmup_fraction * config.steps, 1)
            falling = (config.steps - step) / max(config.decay_fraction * config.steps, 1)
            return min(1.0, rising, max(falling, 0.0))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train_transcoders(
    config: TranscoderConfig,
    layers: Sequence[int],
    activations: ActivationShards,
    seed: int,
    trainer: TrainerConfig,
    checkpoint_dir: Path,
    loggers: Sequence[Logger] = (),
) -> tuple[tuple[Transcoder, ...], TranscoderTraining]:
    """Trained dictionaries in raw units, one a layer, and the module with its prediction heads.

    Raises:
        NumericalError: the loss is not finite.
    """
    x, y = activations.shard(0)
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    stacked = StackedTranscoders(config, len(layers), x.shape[-1], seed)
    first_x, first_y = activations.batch(config.steps, min(_INITIAL_TOKENS, x.shape[1]))
    stacked.initialise(x_scaling(first_x), y_scaling(first_y))
    module = TranscoderTraining(stacked, x_scaling, y_scaling)
    loader = StepLoader(lambda step: activations.batch(step, config.batch_size), config.steps)
    fit(
        module,
        loader,
        trainer,
        config.steps,
        checkpoint_dir,
        loggers,
        ("fvu", "dead"),
        stage="transcoder",
        seed=seed,
    )
    return export(stacked.cpu(), x_scaling, y_scaling, layers), module.cpu()


@torch.no_grad()
def export(
    stacked: StackedTranscoders, x_scaling: Scaling, y_scaling: Scaling, layers: Sequence[int]
) -> tuple[Transcoder, ...]:
    """Fold the scalings into the weights, so that the records map raw inputs to raw outputs."""
    exported = []
    for i, layer in enumerate(layers):
        W_enc = stacked.W_enc[i] * x_scaling.scale[i]
        exported.append(
            Transcoder(
                layer=layer,
                k=stacked.config.k,
                W_enc=W_enc.clone(),
                b_enc=stacked.b_enc[i, 0] - W_enc @ x_scaling.mean[i, 0],
                W_dec=stacked.W_dec[i] / y_scaling.scale[i],
                b_dec=stacked.b_dec[i, 0] / y_scaling.scale[i, 0] + y_scaling.mean[i, 0],
            )
        )
    return tuple(exported)
