"""Normalised spectral clustering (Ng, Jordan & Weiss 2001) of one weighted graph.

`L = I − D^{-1/2} W D^{-1/2}` with `W = ½ (|A| + |A|ᵀ)`, sparse throughout.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from scipy.cluster.vq import kmeans2
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import ArpackNoConvergence, eigsh

_DENSE_BELOW = 64


class Split(NamedTuple):
    """Clusters `[n]` numbered from 0 without gaps, and the gap after the eigenvalues that were used."""

    clusters: np.ndarray
    eigengap: float


def affinity(edge_index: np.ndarray, edge_attr: np.ndarray, n: int) -> csr_array:
    """`½ (|A| + |A|ᵀ)` of a directed graph, `[n, n]`, without self-loops."""
    source, target = edge_index
    a = csr_array((np.abs(edge_attr).astype(np.float64), (source, target)), shape=(n, n))
    w = ((a + a.T) * 0.5).tocsr()
    w.setdiag(0)
    w.eliminate_zeros()
    return w


def spectral_split(w: csr_array, branching: int, seed: int, largest: float = 0.95) -> Split:
    """At most `branching` clusters of the graph `w` `[n, n]`, at least two when n > 1.

    Nodes without edges are one cluster of their own: they would otherwise fill the spectrum with strays. Where one
    cluster would take more than the share `largest` of the nodes, nodes are divided evenly along the second
    eigenvector, so that every split makes progress.
    """
    n = w.shape[0]
    if n <= branching:
        return Split(np.arange(n), 0.0)
    alone = np.diff(w.indptr) == 0
    if branching > 2 and largest > 0 and alone.any() and not alone.all():
        joined = np.flatnonzero(~alone)
        inner = spectral_split(w[joined][:, joined], branching - 1, seed, largest)
        clusters = np.full(n, inner.clusters.max() + 1)
        clusters[joined] = inner.clusters
        return Split(clusters, inner.eigengap)
    values, vectors = _smallest(_normalised_affinity(w), branching + 1, seed)
    rows = vectors[:, :branching]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    with warnings.catch_warnings():  # fewer clusters than asked for are fine
        warnings.filterwarnings("ignore", message="One of the clusters is empty")
        clusters = kmeans2(rows, branching, minit="++", seed=np.random.default_rng(seed), missing="warn")[1]
    clusters = np.unique(clusters, return_inverse=True)[1]
    if np.bincount(clusters).max() > largest * n:
        order = np.argsort(vectors[:, 1], kind="stable")
        clusters = np.empty(n, dtype=np.int64)
        clusters[order] = np.arange(n) * branching // n
    return Split(clusters.astype(np.int64), float(values[branching] - values[branching - 1]))


def _normalised_affinity(w: csr_array) -> csr_array:
    """`D^{-1/2} (W + τ I) D^{-1/2}`; τ, a hundredth of the mean degree, keeps isolated nodes finite."""
    degree = np.asarray(w.sum(axis=1)).ravel()
    ridge = 0.01 * degree.mean() if degree.any() else 1.0
    scale = diags_array(1.0 / np.sqrt(degree + ridge))
    return (scale @ (w + diags_array(np.full(w.shape[0], ridge))) @ scale).tocsr()


def _smallest(normalised: csr_array, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` smallest eigenvalues of `I − normalised`, ascending, and their vectors."""
    n = normalised.shape[0]
    if n <= max(_DENSE_BELOW, count + 2):
        values, vectors = np.linalg.eigh(normalised.toarray())
    else:
        # ARPACK draws again where a graph falls into pieces, so the generator decides more than the start.
        rng = np.random.default_rng(seed)
        try:
            values, vectors = eigsh(normalised, k=count, which="LA", v0=rng.standard_normal(n), tol=1e-4, rng=rng)
        except ArpackNoConvergence as partial:
            values, vectors = partial.eigenvalues, partial.eigenvectors
            if len(values) < count:
                values, vectors = np.linalg.eigh(normalised.toarray())
    order = np.argsort(-values)[:count]
    return 1.0 - values[order], vectors[:, order]
