"""Records of the hierarchy stage."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from hagd.attribution.prompt.records import PromptGraph, PromptNodes
from hagd.attribution.records import AttributionGraph
from hagd.errors import ArtifactError


@dataclass(frozen=True)
class Level:
    """One level of the partition.

    Attributes:
        supernode: int64 `[n]`, the supernode of each node of the graph.
        n_supernodes: how many there are; every one has members.
        modularity: Newman's, weighted by the affinity, over the nodes that have any.
        conductance: mean over the supernodes that have edges, cut weight over the smaller side's volume.
        eigengap: λ_{k+1} − λ_k of the normalised Laplacian, k the eigenvectors used (b at most), mean over the splits
            that made this level.
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
        nodes_key: key of the nodes that it divides, as from `nodes_key`.
    """

    branching: int
    levels: tuple[Level, ...]
    nodes_key: str

    def require(self, graph: AttributionGraph | PromptGraph) -> None:
        """Make sure that it divides the nodes of `graph`.

        Raises:
            ArtifactError: it was built for other nodes; names both keys.
        """
        found = nodes_key(graph)
        if found != self.nodes_key:
            raise ArtifactError(
                f"hierarchy: expected one of the graph at hand, whose nodes have the key {found}, found one of nodes "
                f"with the key {self.nodes_key}; build the hierarchy from this graph"
            )


def nodes_key(graph: AttributionGraph | PromptGraph) -> str:
    """16 hexadecimal digits that identify the nodes of a graph, in their order."""
    nodes = graph.nodes
    place = nodes.position if isinstance(nodes, PromptNodes) else nodes.slot
    identity = np.stack([nodes.kind, nodes.layer, place, nodes.feature]).astype(np.int64)
    return hashlib.sha256(identity.tobytes()).hexdigest()[:16]
