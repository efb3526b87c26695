"""Batches as pure functions of (seed, step), so that a resumed training sees exactly what it would have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from hagd.training.processes import rank_and_world

B = TypeVar("B")


class StepLoader(Generic[B]):
    """Yields `batch(step)` for every step from 0, or from the step after the one that was last yielded before a save.

    `state_dict` and `load_state_dict` are what Lightning looks for when it saves and resumes in mid-epoch.
    """

    def __init__(self, batch: Callable[[int], B], n_steps: int) -> None:
        self.batch = batch
        self.n_steps = n_steps
        self._next = 0

    def __len__(self) -> int:
        return self.n_steps

    def __iter__(self) -> Iterator[B]:
        for step in range(self._next, self.n_steps):
            self._next = step + 1
            yield self.batch(step)
        self._next = 0

    def state_dict(self) -> dict[str, Any]:
        """The step whose batch comes next."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._next = int(state["next"])


def batch_indices(n_items: int, batch_size: int, seed: int, step: int) -> Tensor:
    """Items of the batch of `step`, int64: consecutive pieces of permutations, so items are used equally often.

    With several processes each gets its own share of the batch, so `batch_size` means the same on any machine.
    """
    first, parts, missing = step * batch_size, [], batch_size
    while missing:
        epoch, offset = divmod(first, n_items)
        part = _permutation(n_items, seed, epoch)[offset : offset + missing]
        parts.append(part)
        first, missing = first + len(part), missing - len(part)
    rank, world = rank_and_world()
    indices = torch.from_numpy(np.concatenate(parts))
    return indices[rank::world] if batch_size >= world else indices


@lru_cache(maxsize=2)
def _permutation(n_items: int, seed: int, epoch: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng([seed, epoch]).permutation(n_items)
