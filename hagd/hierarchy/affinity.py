"""Which nodes belong together: the symmetric affinities that the hierarchy can be built on, `[n, n]`, sparse.

Shape legend: n nodes of the graph, n_candidates those of them that are features or heads, N prompts.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array, diags_array, vstack

from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import ERROR, FEATURE, HEAD, AttributionGraph

_PRODUCTS_AT_ONCE = 1 << 24
_DIGITS = 9
"""To which cosines are compared: rows that are alike in exact arithmetic must not be told apart by rounding."""


def edge_affinity(graph: AttributionGraph) -> csr_array:
    """Strength of the edges between features, heads and errors.

    Tokens and the logit are joined to nearly everything: with them in, the first division is the hubs against the rest.
    """
    index, weight = _inner(graph.nodes.kind, graph.edge_index, graph.edge_attr)
    return affinity(index, weight, len(graph.nodes))


def influence_affinity(graph: PromptGraph) -> csr_array:
    """Influence that flows over the edges between features, heads and errors of one prompt's graph."""
    index, influence = _inner(graph.nodes.kind, graph.edge_index, graph.edge_influence)
    return affinity(index, influence, len(graph.nodes))


def attribution_affinity(graph: AttributionGraph) -> csr_array:
    """The attribution that flows over each edge between features, heads and errors.

    A target's importance is divided over its incoming edges, tokens included, in proportion to their strength.
    """
    index, weight = _inner(graph.nodes.kind, graph.edge_index, graph.edge_attr)
    incoming = np.bincount(graph.edge_index[1], weights=np.abs(graph.edge_attr), minlength=len(graph.nodes))
    share = np.abs(weight) / np.maximum(incoming[index[1]], 1e-30)
    return affinity(index, share * graph.nodes.importance[index[1]], len(graph.nodes))


def target_affinity(graph: AttributionGraph, neighbours: int) -> csr_array:
    """Cosine of the outgoing edges of features, heads and errors, each target's incoming edges scaled to one in sum.

    The logit is no target here: nearly every node has an edge to it. A node without other targets has no neighbours.
    """
    index, weight = _inner(graph.nodes.kind, graph.edge_index, graph.edge_attr)
    n = len(graph.nodes)
    incoming = np.bincount(graph.edge_index[1], weights=np.abs(graph.edge_attr), minlength=n)
    profile = csr_array((weight / np.maximum(incoming[index[1]], 1e-30), (index[0], index[1])), shape=(n, n))
    return nearest(profile, neighbours)


def profile_affinity(profile: np.ndarray, n: int, neighbours: int) -> csr_array:
    """Cosine of what candidates do on each prompt, `[n_candidates, N]`; other nodes have no neighbours.

    Raises:
        ValueError: `profile` has more rows than there are nodes.
    """
    others = csr_array((n - len(profile), profile.shape[1]))
    return nearest(vstack([csr_array(profile.astype(np.float64)), others], format="csr"), neighbours)


def affinity(edge_index: np.ndarray, edge_attr: np.ndarray, n: int) -> csr_array:
    """`½ (|A| + |A|ᵀ)` of a directed graph, without self-loops."""
    source, target = edge_index
    a = csr_array((np.abs(edge_attr).astype(np.float64), (source, target)), shape=(n, n))
    w = ((a + a.T) * 0.5).tocsr()
    w.setdiag(0)
    w.eliminate_zeros()
    return w


def nearest(x: csr_array, k: int) -> csr_array:
    """Mean of the graph that joins each row of `x` to the k others of largest positive cosine, and its transpose.

    Exact; among equally alike rows the first are taken. Rows are compared by sparse products, some at a time, so memory
    does not grow with the square of their number; rows without entries have no neighbours.
    """
    n = x.shape[0]
    norms = np.sqrt(np.asarray(x.multiply(x).sum(axis=1)).ravel())
    x = (diags_array(1 / np.where(norms > 0, norms, 1)) @ x).tocsr()
    columns = x.T.tocsr()
    products = np.diff(columns.indptr)[x.indices]
    load = np.concatenate([[0], np.cumsum(products)])[x.indptr]
    chunk_of = load[:-1] // _PRODUCTS_AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(chunk_of)) + 1).tolist(), n]
    rows, cols, values = [], [], []
    for start, stop in pairwise(cuts):
        similar = (x[start:stop] @ columns).tocoo()
        row, col, value = similar.row + start, similar.col, similar.data
        kept = (value > 1e-9) & (row != col)
        row, col, value = row[kept], col[kept], value[kept]
        order = np.lexsort((col, -value.round(_DIGITS), row))
        row, col, value = row[order], col[order], value[order]
        first = np.searchsorted(row, row)
        best = np.arange(len(row)) - first < k
        rows.append(row[best])
        cols.append(col[best])
        values.append(value[best])
    index = np.stack([np.concatenate(rows), np.concatenate(cols)])
    return affinity(index, np.concatenate(values), n)


def _inner(kind: np.ndarray, edge_index: np.ndarray, edge_attr: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges between features, heads and errors, and what is known of them."""
    kept = np.isin(kind, (FEATURE, ERROR, HEAD))[edge_index].all(0)
    return edge_index[:, kept], edge_attr[kept]
