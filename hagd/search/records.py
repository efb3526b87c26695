"""Records of the search stage.

Shape legend: L decomposed layers, S slots, m dictionary size, n nodes of a circuit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Circuit:
    """A set of features and heads: `nodes` int64 `[n]`, ascending positions in the flattened gates."""

    nodes: np.ndarray

    def __len__(self) -> int:
        return len(self.nodes)

    def gates(self, shape: tuple[int, ...]) -> Tensor:
        """1 inside, 0 outside, in the shape of the gates."""
        flat = torch.zeros(shape).flatten()
        flat[torch.as_tensor(self.nodes)] = 1.0
        return flat.view(shape)


@dataclass(frozen=True)
class SearchStep:
    """One part of the search that ran: what it changed and what it cost.

    Attributes:
        name: `scorer`, `traversal`, `elimination`, `gates` (with the choice between rankings; without gates `choice`),
            `pruning`, the method's name, or `size` for the probes of other sizes.
        evaluations: model evaluations, one being a forward pass over the whole discovery split (a gradient step
            over all of it is three).
        seconds: wall time.
        changed: nodes of the reported size that were not there before this part.
        preservation: of the reported size on the selection split after this part; NaN if not measured.
        note: one line for the reader.
    """

    name: str
    evaluations: float
    seconds: float
    changed: int
    preservation: float
    note: str


@dataclass(frozen=True)
class SearchResult:
    """Circuits of several sizes and how they were found.

    Attributes:
        method: as in the configuration.
        size: the reported size.
        circuits: ascending by size; the reported one is among them.
        score: `[n_candidates]` of the graph, the ranking behind the reported circuit, larger is kept longer.
        evaluations: model evaluations in all.
        steps: parts in the order in which they ran.
    """

    method: str
    size: int
    circuits: tuple[Circuit, ...]
    score: np.ndarray
    evaluations: float
    steps: tuple[SearchStep, ...]

    @property
    def circuit(self) -> Circuit:
        """The reported circuit."""
        return next(c for c in self.circuits if len(c) == self.size)
