"""This project's training loop, a step at a time and without Lightning's trainer around it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from contenders import Batches, Training, Weights
from torch import Tensor

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.initialise import initialise
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.training import export

_SCALE_TOKENS = 65_536
_INITIAL_TOKENS = 8192


def ours(training: Training, batches: Batches) -> Weights:
    """TopK with exact selection."""
    return _train(_config(training, "exact"), training, batches)


def ours_bf16(training: Training, batches: Batches) -> Weights:
    """TopK with selection in bfloat16."""
    return _train(_config(training, "bfloat16"), training, batches)


def ours_int8(training: Training, batches: Batches) -> Weights:
    """TopK with selection in eight bits."""
    return _train(_config(training, "int8"), training, batches)


def ours_batch_topk(training: Training, batches: Batches) -> Weights:
    """BatchTopK with exact selection."""
    return _train(_config(training, "exact", "batch_topk"), training, batches)


def ours_jumprelu(training: Training, batches: Batches) -> Weights:
    """JumpReLU. For speed alone: hardly a rate, or two batches over and over would draw most features away."""
    return _train(_config(training, "exact", "jumprelu", learning_rate=1e-6), training, batches)


def _config(training: Training, selection: str, activation: str = "topk", **settings: float) -> TranscoderConfig:
    chosen = {} if training.rate is None else {"learning_rate": training.rate}
    return TranscoderConfig.model_validate(
        {
            "k": training.k,
            "expansion": training.m // training.d,
            "skip": training.skip,
            "selection": selection,
            "activation": activation,
            "steps": training.steps,
            "batch_size": training.batch,
            **chosen,
            **training.own,
            **settings,
        }
    )


def _train(config: TranscoderConfig, training: Training, batches: Batches) -> Weights:
    stacked = StackedTranscoders(config, 1, training.d, training.seed)
    x_scaling, y_scaling = _start(stacked, training, batches) if training.scaled else _unscaled(training.d)
    module = TranscoderTraining(stacked, x_scaling, y_scaling)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    for step, (x, y) in enumerate(batches()):
        if step == 0 and not training.scaled:
            stacked.dictionaries[0].start_at(x)
        loss = module.training_step((x[None], y[None]), step)["loss"]
        loss.backward()
        optimizer.step()
        schedule.step()
        module.on_train_batch_end()
    (record,) = export(stacked, x_scaling, y_scaling, [0])
    weights = {"W_enc": record.W_enc, "b_enc": record.b_enc, "W_dec": record.W_dec, "b_dec": record.b_dec}
    return weights | ({"W_skip": record.W_skip.T} if record.W_skip is not None else {})


def _start(stacked: StackedTranscoders, training: Training, batches: Batches) -> tuple[Scaling, Scaling]:
    """Scalings from the first tokens of the pass, and the start of the weights from fewer of them."""
    x, y = _first_tokens(training, batches())
    x_scaling, y_scaling = Scaling.of(x[None]), Scaling.of(y[None])
    initialise(stacked, x_scaling(x[None, :_INITIAL_TOKENS]), y_scaling(y[None, :_INITIAL_TOKENS]))
    return x_scaling, y_scaling


def _first_tokens(training: Training, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    first = list(islice(batches, -(-_SCALE_TOKENS // training.batch)))
    return torch.cat([x for x, _ in first]), torch.cat([y for _, y in first])


def _unscaled(d: int) -> tuple[Scaling, Scaling]:
    scaling = Scaling(torch.zeros(1, 1, d), torch.ones(1, 1, 1))
    return scaling, scaling
