"""What a training loop is given and gives, and where each contender's loop is.

Importable in this project's environment and in the peers'. Shape legend: B tokens a step, d = d_model, m dictionary
size.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

Batches = Callable[[], Iterator[tuple[Tensor, Tensor]]]
"""Starts a pass over inputs and targets, each `[B, d]`."""

Weights = dict[str, Tensor]
"""`y = W_decᵀ TopK(relu(W_enc x + b_enc)) + b_dec + W_skip x`: `W_enc`, `W_dec` `[m, d]`, `b_enc` `[m]`, `b_dec` `[d]`,
`W_skip` `[d, d]` or absent; raw inputs to raw outputs."""


@dataclass(frozen=True)
class Training:
    """One training.

    Attributes:
        batch: tokens a step.
        steps: steps of the pass.
        rate: learning rate; None takes the package's own choice.
        skip: with a linear map from input to target (transcoders).
        scaled: let the package scale its inputs where it can, as its documentation advises. Off for timing.
        optimizer: sparsify's: its default `signum`, or `adam`.
        seed: of the first weights.
        own: further settings of ours, by the names of their keys.
    """

    d: int
    m: int
    k: int
    batch: int
    steps: int
    rate: float | None = None
    skip: bool = False
    scaled: bool = False
    optimizer: str = "adam"
    seed: int = 0
    own: Mapping[str, float] = field(default_factory=dict)


def is_ours(name: str) -> bool:
    """Whether a contender's loop is in `ours.py`, and not in `peers.py`."""
    return name.startswith("ours")


def training_loop(name: str) -> Callable[[Training, Batches], Weights]:
    """The loop of a contender, from `ours.py` or `peers.py`."""
    loop: Callable[[Training, Batches], Weights] = getattr(
        importlib.import_module("ours" if is_ours(name) else "peers"), name
    )
    return loop


def interpreter(name: str) -> Path:
    """Of the environment that a contender needs; the peers' is made if it is missing."""
    if is_ours(name):
        return Path(sys.executable)
    from peers_environment import peers_python

    return peers_python()


def one_thread() -> dict[str, str]:
    """Environment variables of a contender's process: one thread, no network."""
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return {**os.environ, **threads, "WANDB_MODE": "disabled", "HF_HUB_OFFLINE": "1"}
