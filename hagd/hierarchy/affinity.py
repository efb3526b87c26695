"""Which nodes belong together: the symmetric affinities that the hierarchy can be built on."""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_array


def affinity(edge_index: np.ndarray, edge_attr: np.ndarray, n: int) -> csr_array:
    """`½ (|A| + |A|ᵀ)` of a directed graph, `[n, n]`, without self-loops."""
    source, target = edge_index
    a = csr_array((np.abs(edge_attr).astype(np.float64), (source, target)), shape=(n, n))
    w = ((a + a.T) * 0.5).tocsr()
    w.setdiag(0)
    w.eliminate_zeros()
    return w
