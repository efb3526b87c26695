"""The optimisers of dictionaries."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from hagd.config.transcoder import TranscoderConfig
from hagd.errors import ConfigError

_BETAS = (0.6, 0.99)
"""A usual 0.9 and 0.999 average ten and a thousand steps, too many where a training has some hundred."""


def refuse_missing_package(config: TranscoderConfig) -> None:
    """To be asked before anything long is done for a training.

    Raises:
        ConfigError: the optimiser's package is not installed.
    """
    if config.optimiser != "adam8bit":
        return
    try:
        importlib.import_module("torchao.optim")
    except ImportError as error:
        raise ConfigError(
            "transcoder.optimiser=adam8bit: expected the package torchao, found none; "
            "pip install 'hagd[optim8bit]', or choose adam or adafactor"
        ) from error


def build_optimiser(config: TranscoderConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimiser of groups of parameters.

    Raises:
        ConfigError: its package is not installed.
    """
    match config.optimiser:
        case "adam":
            return torch.optim.Adam(groups, lr=config.learning_rate, betas=_BETAS, fused=True)
        case "adafactor":
            from transformers.optimization import Adafactor

            # Every entry moves as the schedule asks: torch's own would scale rates by the parameters' size, with which
            # biases, which start at zero, hardly move. Clipping of the update off: it would change the rate too.
            return Adafactor(
                groups,
                lr=config.learning_rate,
                clip_threshold=float("inf"),
                scale_parameter=False,
                relative_step=False,
            )
        case "adam8bit":
            refuse_missing_package(config)
            from torchao.optim import Adam8bit

            return Adam8bit(groups, lr=config.learning_rate, betas=_BETAS)
