"""Records of the circuit scorer.

Shape legend: n nodes and supernodes, E edges, F inputs a node.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

NODE, NODE_BACK, SUPERNODE, SUPERNODE_BACK, UP, DOWN = range(6)
"""Types of edges: along and against a node's edge, along and against a supernode's, from a child to its supernode
and from a supernode to its children."""
N_EDGE_TYPES = 6


@dataclass(frozen=True)
class ScoredGraph:
    """An attribution graph with its hierarchy, as the scorer reads it; nothing in it depends on the order of nodes.

    Attributes:
        name: what it was made from, for messages and for the record of what a scorer was trained on.
        inputs: float32 `[n, F]`; the graph's nodes in their order (candidates first), then the supernodes of every
            level, coarse to fine. Columns are `hagd.search.scorer.inputs.INPUTS`.
        edge_index: int64 `[2, E]`, source and target: the strongest edges into each node and supernode, both ways,
            and containment.
        edge_type: int64 `[E]`, one of the six types above.
        edge_attr: float32 `[E, 2]`, size relative to the strongest edge into the same target (1 = the strongest,
            logarithmic), and sign. 1 and 0 between a supernode and its children.
        n_candidates: the first rows of `inputs`, which are scored.
        target: float32 `[n_candidates]` in [0, 1], what a score should rank; zeros when unknown.
    """

    name: str
    inputs: Tensor
    edge_index: Tensor
    edge_type: Tensor
    edge_attr: Tensor
    n_candidates: int
    target: Tensor


@dataclass(frozen=True)
class TrainedScorer:
    """Weights of a scorer, what it expects, and what is known about it.

    Attributes:
        state: weights by name.
        config: arguments of `CircuitScorer`: n_inputs, hidden, heads, n_layers, edges.
        inputs: names of the input columns that it was trained on.
        trained_on: names of the graphs whose circuits it has seen.
        validation_graph: the graph that it has not seen, None if there were too few to hold one out.
        validation_correlation: Spearman correlation of score and target there.
        importance_correlation: the same for node importance alone, which a useful scorer exceeds.
    """

    state: dict[str, Tensor]
    config: dict[str, int | bool]
    inputs: tuple[str, ...]
    trained_on: tuple[str, ...]
    validation_graph: str | None
    validation_correlation: float | None
    importance_correlation: float | None
