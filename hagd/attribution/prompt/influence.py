"""How much of the logits goes through each node and edge, and the graph without what carries little.

Influence as in circuit-tracer (Ameisen et al. 2025): with Â the matrix of |edges| divided by its row sums (rows are
targets) and w the logits' weights, `B = Σ_t w Âᵗ`. Edges lead upwards only, so one pass from the last layer down sums
the whole series: when a target's turn comes, all that it passes on has arrived.

Shape legend: N nodes, E edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hagd.attribution.prompt.edge_file import Block, StoredEdges

_EXPONENTS = 2**12
"""More than double precision has powers of two."""

Flow = Callable[[Block, np.ndarray], None]
"""Called with a block and the influence `[e]` that each of its edges carries."""


def pass_down(
    edges: StoredEdges, weights: np.ndarray, kept: np.ndarray | None = None, flow: Flow | None = None
) -> np.ndarray:
    """Influence `[N]` of every node.

    Args:
        edges: of the graph.
        weights: `[N]`, of the logits; 0 elsewhere.
        kept: bool `[N]`; edges that touch another node do not exist. None = all.
        flow: gets what each edge carries.
    """
    arrived = weights.astype(np.float64)
    for block in edges.from_above(kept):
        if kept is not None:
            inside = kept[block.source]
            block = Block(block.row[inside], block.targets, block.source[inside], block.value[inside])
        size = np.abs(block.value)
        total = np.bincount(block.row, size, minlength=len(block.targets))
        share = (arrived[block.targets] / np.maximum(total, 1e-30))[block.row] * size
        arrived += np.bincount(block.source, share, minlength=len(arrived))
        if flow is not None:
            flow(block, share)
    return arrived - weights


class Largest:
    """Which of many positive numbers are needed, largest first, to reach a share of their sum; without sorting them.

    Seen twice: `add` all, then `candidates` says which of them may be needed, and of these `cutoff` finds the smallest.
    Only numbers of the power of two in which the sum reaches the share are sorted.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._sums = np.zeros(_EXPONENTS)

    def add(self, scores: np.ndarray) -> None:
        """Count `scores`."""
        self._sums += np.bincount(_exponent(scores), scores, minlength=_EXPONENTS)

    def candidates(self, scores: np.ndarray) -> np.ndarray:
        """Bool: which of them are no smaller than the power of two of the cutoff."""
        return _exponent(scores) >= self._place()[0]

    def cutoff(self, scores: np.ndarray) -> float:
        """The smallest number needed; `scores` holds all candidates."""
        exponent, before, goal = self._place()
        inside = np.sort(scores[_exponent(scores) == exponent])[::-1]
        reached = before + inside.cumsum(dtype=np.float64)
        return float(inside[min(int(np.searchsorted(reached, goal)), len(inside) - 1)])

    def _place(self) -> tuple[int, float, float]:
        """Exponent of the cutoff, sum of what is above it, and the sum that is to be reached."""
        from_above = self._sums[::-1].cumsum()
        goal = self._share * from_above[-1]
        lowest = _EXPONENTS - 1 - int(np.flatnonzero(self._sums)[0])
        place = min(int(np.searchsorted(from_above, goal)), lowest)
        return _EXPONENTS - 1 - place, float(from_above[place - 1]) if place else 0.0, goal


def _exponent(scores: np.ndarray) -> np.ndarray:
    return np.frexp(scores)[1].astype(np.int64) + _EXPONENTS // 2


def smallest_kept(scores: np.ndarray, share: float) -> float:
    """The smallest of some positive numbers that is needed, largest first, to reach `share` of their sum."""
    largest = Largest(share)
    largest.add(scores)
    return largest.cutoff(scores)


@dataclass(frozen=True)
class Pruned:
    """What is left.

    Attributes:
        nodes: bool `[N]`.
        source, target: int64 `[E]`. value: float32 `[E]`. flow: float64 `[E]`, influence carried.
    """

    nodes: np.ndarray
    source: np.ndarray
    target: np.ndarray
    value: np.ndarray
    flow: np.ndarray


def prune(
    edges: StoredEdges,
    weights: np.ndarray,
    influence: np.ndarray,
    *,
    n_inner: int,
    first_token: int,
    node_share: float,
    edge_share: float,
) -> Pruned:
    """The nodes with `node_share` of all influence, and of the edges between them those that carry `edge_share`.

    Tokens and logits stay. Features and heads that nothing enters, and whatever else leads nowhere, go.

    Args:
        edges: of the graph.
        weights: `[N]`, of the logits; 0 elsewhere.
        influence: `[N]`, from `pass_down`.
        n_inner: features and heads are the first nodes.
        first_token: the nodes from here on are tokens and logits.
        node_share, edge_share: in (0, 1].
    """
    nodes = influence >= smallest_kept(influence[influence > 0], node_share)
    nodes[first_token:] = True
    needed, found = Largest(edge_share), list[tuple[np.ndarray, ...]]()

    def count(_: Block, flow: np.ndarray) -> None:
        needed.add(flow[flow > 0])

    def collect(block: Block, flow: np.ndarray) -> None:
        own = np.flatnonzero(flow > 0)
        own = own[needed.candidates(flow[own])]
        found.append((block.source[own], block.targets[block.row[own]], block.value[own], flow[own]))

    pass_down(edges, weights, nodes, count)
    pass_down(edges, weights, nodes, collect)
    source, target, value, flow = (np.concatenate(column) for column in zip(*found, strict=True))
    found.clear()
    strong = flow >= needed.cutoff(flow)
    source, target, value, flow = source[strong].astype(np.int64), target[strong], value[strong], flow[strong]
    while True:
        left = np.zeros_like(nodes)
        left[first_token:] = True
        passing = np.bincount(source, minlength=len(nodes)) > 0
        passing[:n_inner] &= np.bincount(target, minlength=len(nodes))[:n_inner] > 0
        left = nodes & (left | passing)
        joined = left[source] & left[target]
        if joined.all():
            return Pruned(left, source, target, value, flow)
        nodes, source, target, value, flow = left, source[joined], target[joined], value[joined], flow[joined]
