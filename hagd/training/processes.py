"""Several processes that share one training: Lightning, torchrun or SLURM start them, one a device."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def is_helper() -> bool:
    """Whether this process only lends its device to trainings that another one, of rank 0, leads and stores."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return any(rank != "0" for rank in ranks)


def rank_and_world() -> tuple[int, int]:
    """This process's place among those of the running training, and their number."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def mean_over_processes(value: Tensor) -> Tensor:
    """Mean of a tensor over the processes of the running training, without gradient."""
    value = value.detach()
    world = rank_and_world()[1]
    if world > 1:
        value = value.clone()
        torch.distributed.all_reduce(value)
        value = value / world
    return value
