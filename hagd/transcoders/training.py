"""Trains the dictionaries of all layers in one pass over the activations, as a Lightning module."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hagd.activations.shards import ActivationShards
from hagd.config.run import TrainerConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.training.fit import fit
from hagd.training.loader import StepLoader
from hagd.training.processes import dividing_layers
from hagd.transcoders.dictionary import Dictionary
from hagd.transcoders.divided import DividedTraining
from hagd.transcoders.initialise import initialise
from hagd.transcoders.joint import JointTraining
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.records import Transcoder
from hagd.transcoders.sharded import ShardedTraining

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)

_JOINT: dict[str, type[JointTraining]] = {"layers": DividedTraining, "fsdp": ShardedTraining}
"""By `trainer.strategy`; with any other one every process has the whole."""

_SCALING_TOKENS = 16_384
_INITIAL_TOKENS = 8192


class Trained(NamedTuple):
    """What a training leaves.

    Attributes:
        transcoders: in raw units, one a layer.
        module: with its prediction heads.
        tokens_per_second: wall-clock rate since the training was last resumed.
        waiting: share of that time spent waiting for activations.
    """

    transcoders: tuple[Transcoder, ...]
    module: TranscoderTraining
    tokens_per_second: float
    waiting: float


def train_transcoders(
    config: TranscoderConfig,
    layers: Sequence[int],
    activations: ActivationShards,
    seed: int,
    trainer: TrainerConfig,
    checkpoint_dir: Path,
    loggers: Sequence[Logger] = (),
) -> Trained:
    """Dictionaries of all layers, trained.

    Raises:
        NumericalError: the loss is not finite, or diverges.
    """
    x, y = activations.sample(_SCALING_TOKENS)
    x_scaling, y_scaling = Scaling.of(x), Scaling.of(y)
    initial = x[:, :_INITIAL_TOKENS], y[:, :_INITIAL_TOKENS]
    joint = _JOINT.get(trainer.strategy)
    module = (
        joint(config, seed, x_scaling, y_scaling, initial, layers)
        if joint
        else TranscoderTraining(_started(config, seed, x_scaling, y_scaling, initial), x_scaling, y_scaling, layers)
    )
    n_drawn = 0

    def batch(step: int) -> tuple[Tensor, Tensor]:
        nonlocal n_drawn
        n_drawn += config.batch_size
        return activations.batch(step, config.batch_size, device=module.device)

    loader = StepLoader(batch, config.steps)
    began, waited = time.perf_counter(), activations.seconds_waited
    with dividing_layers() if joint is DividedTraining else nullcontext():
        fit(
            module,
            loader,
            trainer,
            config.steps,
            checkpoint_dir / trainer.strategy if joint else checkpoint_dir,
            loggers,
            ("fvu", "dead"),
            stage="transcoder",
            seed=seed,
            tokens=config.batch_size,
            joint=joint is not None,
        )
    seconds = time.perf_counter() - began
    waiting = (activations.seconds_waited - waited) / seconds
    log.info("transcoder: %.1f %% of the time went by waiting for activations", 100 * waiting)
    for logger in loggers:
        logger.log_metrics({"transcoder/waiting": waiting}, step=config.steps)
    if isinstance(module, JointTraining):
        module = TranscoderTraining(module.whole(), x_scaling, y_scaling)
    module = module.cpu()
    transcoders = export(module.stacked, x_scaling, y_scaling, layers)
    return Trained(transcoders, module, n_drawn / seconds, waiting)


def _started(
    config: TranscoderConfig, seed: int, x_scaling: Scaling, y_scaling: Scaling, initial: tuple[Tensor, Tensor]
) -> StackedTranscoders:
    """The stack of all layers, started from raw tokens `[L, B, d]`."""
    n_layers, _, d = initial[0].shape
    stacked = StackedTranscoders(config, n_layers, d, seed)
    initialise(stacked, x_scaling(initial[0]), y_scaling(initial[1]))
    return stacked


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
    W_enc = dictionary.W_enc @ dictionary.basis.T * x_scaling.scale[i]
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
