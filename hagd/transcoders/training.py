"""Trains the dictionaries of all layers in one pass over the activations, as a Lightning module."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from hagd.activations.shards import ActivationShards
from hagd.config.run import TrainerConfig
from hagd.config.stages import TranscoderConfig
from hagd.errors import ConfigError
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.transcoders.dictionary import Dictionary
from hagd.transcoders.initialise import initialise
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.records import Transcoder

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

_SCALING_TOKENS = 16_384
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
            "l0": losses.l0.detach(),
            "dead": self.stacked.dead().float().mean(),
        }

    def configure_optimizers(self) -> Any:
        """The optimiser and its schedule, a function of the step alone."""
        config = self.stacked.config
        optimiser = _optimiser(config, self.stacked.parameters())

        def rate(step: int) -> float:
            rising = (step + 1) / max(config.warmup_fraction * config.steps, 1)
            falling = (config.steps - step) / max(config.decay_fraction * config.steps, 1)
            return min(1.0, rising, max(falling, 0.0))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
        return {"optimizer": optimiser, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def _optimiser(config: TranscoderConfig, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    match config.optimiser:
        case "adam":
            return torch.optim.Adam(parameters, lr=config.learning_rate, betas=_BETAS, fused=True)
        case "adafactor":
            # Decay and clipping of the update off: they would change the rate that the schedule asks for.
            return torch.optim.Adafactor(
                parameters, lr=config.learning_rate, eps=(None, 1e-6), d=float("inf"), weight_decay=0.0
            )
        case "adam8bit":
            try:
                from torchao.optim import Adam8bit
            except ImportError as error:
                raise ConfigError(
                    "transcoder.optimiser=adam8bit: expected the package torchao, found none; "
                    "pip install 'hagd[optim8bit]', or choose adam or adafactor"
                ) from error
            return Adam8bit(parameters, lr=config.learning_rate, betas=_BETAS)


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
    x, y = activations.sample(_SCALING_TOKENS)
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    stacked = StackedTranscoders(config, len(layers), x.shape[-1], seed)
    initialise(stacked, x_scaling(x[:, :_INITIAL_TOKENS]), y_scaling(y[:, :_INITIAL_TOKENS]))
    module = TranscoderTraining(stacked, x_scaling, y_scaling)
    loader = StepLoader(lambda step: activations.batch(step, config.batch_size), config.steps)
    began, waited = time.perf_counter(), activations.seconds_waited
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
        tokens=config.batch_size,
    )
    waiting = (activations.seconds_waited - waited) / (time.perf_counter() - began)
    log.info("transcoder: %.1f %% of the time went by waiting for activations", 100 * waiting)
    for logger in loggers:
        logger.log_metrics({"transcoder/waiting": waiting}, step=config.steps)
    return export(stacked.cpu(), x_scaling, y_scaling, layers), module.cpu()


@torch.no_grad()
def export(
    stacked: StackedTranscoders, x_scaling: Scaling, y_scaling: Scaling, layers: Sequence[int]
) -> tuple[Transcoder, ...]:
    """Fold the scalings into the weights, so that the records map raw inputs to raw outputs."""
    return tuple(
        _export_layer(dictionary, x_scaling, y_scaling, i, layer)
        for i, (dictionary, layer) in enumerate(zip(stacked.dictionaries, layers, strict=True))
    )


def _export_layer(dictionary: Dictionary, x_scaling: Scaling, y_scaling: Scaling, i: int, layer: int) -> Transcoder:
    """One layer in raw units. Features keep their scale."""
    activation = dictionary.config.activation
    W_enc = dictionary.W_enc * x_scaling.scale[i]
    decoders = dictionary.W_dec.unflatten(1, (-1, dictionary.d)).unbind(1)
    own, *later = (decoder / y_scaling.scale[i + j] for j, decoder in enumerate(decoders))
    b_dec = dictionary.b_dec / y_scaling.scale[i, 0] + y_scaling.mean[i, 0]
    skip = None
    if dictionary.W_skip is not None:
        skip = dictionary.W_skip * x_scaling.scale[i] / y_scaling.scale[i]
        b_dec = b_dec - x_scaling.mean[i, 0] @ skip
    threshold = None
    if activation == "jumprelu":
        threshold = dictionary.thresholds().clone()
    elif activation != "topk":
        threshold = dictionary.threshold_mean.expand(dictionary.m).clone()
    return Transcoder(
        layer=layer,
        k=dictionary.config.k if activation == "topk" else None,
        W_enc=W_enc.clone(),
        b_enc=dictionary.b_enc - W_enc @ x_scaling.mean[i, 0],
        W_dec=own,
        b_dec=b_dec,
        threshold=threshold,
        W_skip=skip,
        W_later=tuple(later),
    )
