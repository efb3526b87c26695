"""How modular a partition is, and what its supernodes' edges are."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array

from hagd.attribution.records import AttributionGraph


def modularity(w: csr_array, supernode: np.ndarray) -> float:
    """Newman (2006): share of weight inside supernodes minus what degrees alone would give; 0 without edges."""
    total = w.sum()
    if total == 0:
        return 0.0
    coo = w.tocoo()
    inside = coo.data[supernode[coo.row] == supernode[coo.col]].sum() / total
    degree = np.bincount(supernode, weights=np.asarray(w.sum(axis=1)).ravel()) / total
    return float(inside - (degree**2).sum())


def conductance(w: csr_array, supernode: np.ndarray) -> float:
    """Mean, over the supernodes that have edges, of cut weight over the volume of the smaller side; 0 without edges.

    A supernode without edges, or one that has all of them, divides nothing and does not count.
    """
    coo = w.tocoo()
    cut = np.zeros(supernode.max() + 1)
    crossing = supernode[coo.row] != supernode[coo.col]
    np.add.at(cut, supernode[coo.row[crossing]], coo.data[crossing])
    volume = np.bincount(supernode, weights=np.asarray(w.sum(axis=1)).ravel())
    smaller = np.minimum(volume, volume.sum() - volume)
    counted = smaller > 0
    return float((cut[counted] / smaller[counted]).mean()) if counted.any() else 0.0


def supernode_edges(graph: AttributionGraph, supernode: np.ndarray) -> csr_array:
    """Edges between supernodes: sums of their members' edges, `[n_supernodes, n_supernodes]`."""
    source, target = graph.edge_index
    size = int(supernode.max()) + 1
    summed = csr_array((graph.edge_attr, (supernode[source], supernode[target])), shape=(size, size))
    summed.sum_duplicates()
    return summed
