"""One step of the recursion: every supernode that is still too large is divided, all of them together."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components

from hagd.hierarchy.kmeans import grouped_kmeans
from hagd.hierarchy.spectral import spectral_embeddings


@dataclass(frozen=True)
class Blocks:
    """Nodes sorted by supernode, and within one by connected piece, the largest first.

    Attributes:
        nodes: int64 `[n]`, the node at each place.
        bounds: int64 `[G + 1]`, supernode g has the places from `bounds[g]` up to `bounds[g + 1]`.
        piece: int64 `[n]`, connected piece at each place, numbered in order of place.
        w: affinities between places of one supernode; others are dropped, so it is block-diagonal.
    """

    nodes: np.ndarray
    bounds: np.ndarray
    piece: np.ndarray
    w: csr_array


def arrange(w: csr_array, supernode: np.ndarray) -> Blocks:
    """The blocks of a partition `[n]` of the graph `w` `[n, n]`."""
    coo = w.tocoo()
    inside = supernode[coo.row] == supernode[coo.col]
    row, col, data = coo.row[inside], coo.col[inside], coo.data[inside]
    n = len(supernode)
    piece = connected_components(csr_array((data, (row, col)), shape=(n, n)), directed=False)[1]
    size = np.bincount(piece)[piece]
    nodes = np.lexsort((piece, -size, supernode))
    place = np.empty(n, dtype=row.dtype)
    place[nodes] = np.arange(n)
    ordered = piece[nodes]
    changes = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
    bounds = np.searchsorted(supernode[nodes], np.arange(supernode.max() + 2))
    return Blocks(nodes, bounds, changes, csr_array((data, (place[row], place[col])), shape=(n, n)))


@dataclass(frozen=True)
class _Solve:
    """A supernode `[start, stop)` whose first piece `[start, end)` is divided by its eigenvectors into `k` children."""

    start: int
    end: int
    stop: int
    k: int


def divide(
    blocks: Blocks, branching: int, min_size: int, largest: float, rng: np.random.Generator
) -> tuple[np.ndarray, list[float]]:
    """Child `[n]` of each place within its supernode, below `branching`, and the eigengaps of the solves.

    Every supernode of more than `min_size` nodes gets at least two children. One whose largest connected piece has at
    most half of its nodes is divided by pieces. Otherwise that piece is divided by its eigenvectors, and the strays are
    a child of their own. Where one child would take more than the share `largest` of the nodes, they are divided
    evenly along the second eigenvector, so that every division makes progress.
    """
    child = np.zeros(len(blocks.nodes), dtype=np.int64)
    solves = []
    for start, stop in pairwise(blocks.bounds.tolist()):
        n = stop - start
        if n <= min_size:
            continue
        main = int(np.searchsorted(blocks.piece[start:stop], blocks.piece[start], side="right"))
        apart = branching == 2 and main <= largest * n < n
        if n <= branching:
            child[start:stop] = np.arange(n)
        elif main == 1 or (largest == 0 and main == 2):
            child[start:stop] = np.arange(n) * branching // n
        elif largest > 0 and (2 * main <= n or apart):
            child[start:stop] = _packed(blocks.piece[start:stop], branching)
        else:
            k = branching if main == n or branching == 2 else branching - 1
            solves.append(_Solve(start, start + main, stop, min(k, main - 1) if largest > 0 else 2))
    gaps: list[float] = []
    for k in sorted({solve.k for solve in solves}):
        gaps += _by_eigenvectors(blocks.w, [s for s in solves if s.k == k], branching, largest, rng, child)
    return child, gaps


def _by_eigenvectors(
    w: csr_array, solves: list[_Solve], branching: int, largest: float, rng: np.random.Generator, child: np.ndarray
) -> list[float]:
    """Fill `child` for supernodes that need as many eigenvectors; returns the eigengaps."""
    k = solves[0].k
    found = spectral_embeddings(w, [(s.start, s.end) for s in solves], k, rng)
    if largest > 0:
        rows = np.concatenate([embedding.vectors for embedding in found])
        rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
        bounds = np.cumsum([0] + [s.end - s.start for s in solves])
        clusters = np.split(grouped_kmeans(rows, bounds, k, rng), bounds[1:-1])
    for i, solve in enumerate(solves):
        n, main = solve.stop - solve.start, solve.end - solve.start
        if largest > 0:
            strays = k if k < branching else int(np.bincount(clusters[i], minlength=k).argmin())
            labels = np.concatenate([clusters[i], np.full(n - main, strays)])
        if largest == 0 or np.bincount(labels).max() > largest * n:
            along = np.argsort(found[i].vectors[:, 1], kind="stable")
            labels = np.empty(n, dtype=np.int64)
            labels[np.concatenate([along, np.arange(main, n)])] = np.arange(n) * branching // n
        child[solve.start : solve.stop] = labels
    return [embedding.eigengap for embedding in found]


def _packed(piece: np.ndarray, branching: int) -> np.ndarray:
    """Child of each node when whole pieces, largest first, go to the child with the fewest nodes so far."""
    sizes = np.bincount(piece - piece[0])
    load, child = [0] * branching, np.empty(len(sizes), dtype=np.int64)
    for i, size in enumerate(sizes.tolist()):
        child[i] = load.index(min(load))
        load[child[i]] += size
    return child[piece - piece[0]]
