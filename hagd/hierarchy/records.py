"""Records of the hierarchy stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Level:
    """One level of the partition.

    Attributes:
        supernode: int64 `[n]`, the supernode of each node of the graph.
        n_supernodes: how many there are; every one has members.
        modularity: Newman's, weighted by |A|, over the nodes that have edges.
        conductance: mean over supernodes, cut weight over the smaller side's volume.
        eigengap: λ_{b+1} − λ_b of the normalised Laplacian, mean over the splits that made this level.
    """

    supernode: np.ndarray
    n_supernodes: int
    modularity: float
    conductance: float
    eigengap: float


@dataclass(frozen=True)
class Hierarchy:
    """Levels from coarse to fine; each refines the one before.

    Attributes:
        branching: at most this many children a supernode.
        levels: coarse to fine; nodes themselves are the children of the last level's supernodes.
    """

    branching: int
    levels: tuple[Level, ...]
