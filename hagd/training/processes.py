"""Several processes that share one training: Lightning, torchrun or SLURM start them, one a device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor


def is_helper() -> bool:
    """Whether this process only lends its device to trainings that another one, of rank 0, leads and stores."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return any(rank != "0" for rank in ranks)


_ENDED = ("Connection reset by peer", "Connection closed by peer", "Broken pipe", "ncclRemoteError")
"""What gloo and NCCL say in a `RuntimeError` when the process that they talk to is gone."""


def another_ended(error: RuntimeError) -> bool:
    """Whether an exchange between processes failed because one of them ended."""
    return any(text in str(error) for text in _ENDED)


_layers_divided = ContextVar("layers_divided", default=False)


@contextmanager
def dividing_layers() -> Iterator[None]:
    """Within: every process reads all tokens for layers of its own, and has nothing to average with others."""
    token = _layers_divided.set(True)
    try:
        yield
    finally:
        _layers_divided.reset(token)


def rank_and_world() -> tuple[int, int]:
    """This process's place among those that share the tokens of the running training, and their number."""
    if _layers_divided.get():
        return 0, 1
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes that share the tokens of the running training, without gradient."""
    value = value.detach()
    world = rank_and_world()[1]
    if world > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / world
    return value
