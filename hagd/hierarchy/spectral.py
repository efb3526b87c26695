"""Spectral embedding (Ng, Jordan & Weiss 2001) of connected weighted graphs, many at once.

`L = I − D^{-1/2} W D^{-1/2}`, sparse throughout; graphs of a few dozen nodes are solved densely, many in one call.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array, diags_array
from scipy.sparse.linalg import ArpackNoConvergence, eigsh, lobpcg

_DENSE_UP_TO = 96
_STEP = 8
_ENTRIES_AT_ONCE = 1 << 22
_RIDGE = 0.01
_TOLERANCE = 1e-4
_RESTARTS = 100


class Embedding(NamedTuple):
    """Eigenvectors of one connected graph's normalised Laplacian.

    Attributes:
        vectors: `[n, k]`, of the k smallest eigenvalues, ascending.
        eigengap: λ_{k+1} − λ_k.
    """

    vectors: np.ndarray
    eigengap: float


def spectral_embeddings(
    w: csr_array, parts: list[tuple[int, int]], k: int, rng: np.random.Generator
) -> list[Embedding]:
    """Embeddings of the ranges `parts` of `w`, each a graph of its own with more than `k` nodes.

    Args:
        w: symmetric, non-negative; rows of a part have columns in that part only.
        parts: first row and the row after the last one.
        k: vectors a part.
        rng: of the starting vectors of sparse solves.
    """
    found: dict[int, Embedding] = {}
    small: dict[int, list[int]] = {}
    for i, (start, stop) in enumerate(parts):
        n = stop - start
        if n <= max(_DENSE_UP_TO, k + 2):
            small.setdefault(-(-n // _STEP) * _STEP, []).append(i)
        else:
            found[i] = _sparse(_block(w, start, stop), k, rng)
    for size, members in small.items():
        at_once = max(1, _ENTRIES_AT_ONCE // size**2)
        for first in range(0, len(members), at_once):
            chunk = members[first : first + at_once]
            found |= dict(zip(chunk, _dense(w, [parts[i] for i in chunk], size, k), strict=True))
    return [found[i] for i in range(len(parts))]


def normalised_affinity(w: csr_array) -> csr_array:
    """`D^{-1/2} (W + τ I) D^{-1/2}`; τ, a hundredth of the mean degree, damps nodes that hang on one weak edge."""
    degree = np.asarray(w.sum(axis=1)).ravel()
    ridge = _RIDGE * degree.mean()
    scale = diags_array(1.0 / np.sqrt(degree + ridge))
    return (scale @ (w + diags_array(np.full(w.shape[0], ridge))) @ scale).tocsr()


def _block(w: csr_array, start: int, stop: int) -> csr_array:
    entries = slice(w.indptr[start], w.indptr[stop])
    n = stop - start
    return csr_array(
        (w.data[entries], w.indices[entries] - start, w.indptr[start : stop + 1] - w.indptr[start]), shape=(n, n)
    )


def _sparse(w: csr_array, k: int, rng: np.random.Generator) -> Embedding:
    """Lanczos with implicit restarts; where it does not converge (very long chains), the best of a block iteration.

    That begins at random: it breaks down where some of the vectors it begins with have converged already.
    """
    normalised = normalised_affinity(w)
    n = w.shape[0]
    try:
        values, vectors = eigsh(
            normalised,
            k=k + 1,
            which="LA",
            v0=rng.standard_normal(n),
            tol=_TOLERANCE,
            maxiter=_RESTARTS,
            rng=rng,
        )
    except ArpackNoConvergence:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Exited", category=UserWarning)
            values, vectors = lobpcg(normalised, rng.standard_normal((n, k + 1)), largest=True, maxiter=_RESTARTS)
    order = np.argsort(-values)
    return Embedding(vectors[:, order[:k]], float(values[order[k - 1]] - values[order[k]]))


def _dense(w: csr_array, parts: list[tuple[int, int]], size: int, k: int) -> list[Embedding]:
    """All eigenvectors of graphs of at most `size` nodes, padded to that size."""
    lengths = np.array([stop - start for start, stop in parts])
    dense = np.zeros((len(parts), size, size))
    for i, (start, stop) in enumerate(parts):
        rows = np.repeat(np.arange(stop - start), np.diff(w.indptr[start : stop + 1]))
        entries = slice(w.indptr[start], w.indptr[stop])
        dense[i, rows, w.indices[entries] - start] = w.data[entries]
    real = np.arange(size) < lengths[:, None]
    degree = dense.sum(-1)
    ridge = _RIDGE * degree.sum(-1, keepdims=True) / lengths[:, None]
    diagonal = np.arange(size)
    dense[:, diagonal, diagonal] += ridge
    scale = np.where(real, 1 / np.sqrt(np.where(real, degree + ridge, 1)), 0)
    dense *= scale[:, :, None] * scale[:, None, :]
    dense[:, diagonal, diagonal] -= 2.0 * ~real  # below the spectrum, so that padding never comes first
    values, vectors = np.linalg.eigh(dense)
    gaps = values[:, -k] - values[:, -k - 1]
    return [
        Embedding(vectors[i, :n, : -k - 1 : -1], float(gap))
        for i, (n, gap) in enumerate(zip(lengths, gaps, strict=True))
    ]
