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
        modularity: Newman's, weighted by the affinity, over the nodes that have any.
        conductance: mean over supernodes, cut weight over the smaller side's volume.
        eigengap: λ_{b+1} − λ_b of the normalised Laplacian, mean over the splits that made this level.
        coherence: correlation over selection prompts between the effects of ablating two members of one supernode
            (`hagd.hierarchy.coherence`); NaN where not measured.
        coherence_null: the same for random groups of the same sizes.
    """

    supernode: np.ndarray
    n_supernodes: int
    modularity: float
    conductance: float
    eigengap: float
    coherence: float = float("nan")
    coherence_null: float = float("nan")


@dataclass(frozen=True)
class Hierarchy:
    """Levels from coarse to fine; each refines the one before.

    Attributes:
        branching: at most this many children a supernode.
        levels: coarse to fine; nodes themselves are the children of the last level's supernodes.
    """

    branching: int
    levels: tuple[Level, ...]
