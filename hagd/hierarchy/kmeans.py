"""k-means of many small sets of points at once, so that thousands of supernodes cost no Python loop.

Shape legend: N points, G groups (contiguous ranges of points), d dimensions, k clusters a group. Points and centres are
kept by dimension (`[d, N]`, `[k, d, G]`): sums over so few dimensions are faster that way.
"""

from __future__ import annotations

import numpy as np

_ITERATIONS = 20
_STARTS = 3


def grouped_kmeans(points: np.ndarray, bounds: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Cluster `[N]`, from 0 to k − 1, of each point within its group; some clusters may be empty.

    Lloyd's iterations from k-means++ seeds (Arthur & Vassilvitskii 2007); of several starts each group keeps the one
    with the smallest sum of squared distances.

    Args:
        points: `[N, d]`.
        bounds: `[G + 1]`, group g holds the points from `bounds[g]` up to `bounds[g + 1]`; none is empty.
        k: clusters a group.
        rng: of the seeds.
    """
    points = np.ascontiguousarray(points.T)
    sizes = np.diff(bounds)
    best = np.zeros(points.shape[1], dtype=np.int64)
    least = np.full(len(sizes), np.inf)
    for _ in range(_STARTS):
        cluster, squares = _lloyd(points, sizes, _seeds(points, bounds, k, rng))
        inertia = np.add.reduceat(squares, bounds[:-1])
        better = inertia < least * (1 - 1e-9)
        least[better] = inertia[better]
        best = np.where(np.repeat(better, sizes), cluster, best)
    return best


def _seeds(points: np.ndarray, bounds: np.ndarray, k: int, rng: np.random.Generator) -> np.ndarray:
    """Centres `[k, d, G]`: each next one drawn with probability proportional to the squared distance so far."""
    first, last, sizes = bounds[:-1], bounds[1:] - 1, np.diff(bounds)
    centres = np.empty((k, len(points), len(sizes)))
    squares = np.ones(points.shape[1])
    for j in range(k):
        total = np.cumsum(squares)
        before = total[first] - squares[first]
        drawn = before + rng.random(len(first)) * (total[last] - before)
        chosen = np.clip(np.searchsorted(total, drawn, side="right"), first, last)
        centres[j] = points[:, chosen]
        distance = _squares(points, centres[j], sizes)
        squares = distance if j == 0 else np.minimum(squares, distance)
    return centres


def _lloyd(points: np.ndarray, sizes: np.ndarray, centres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clusters and squared distances to their centres, each `[N]`."""
    k, d, n_groups = centres.shape
    group = np.repeat(np.arange(n_groups), sizes)
    cluster = np.full(points.shape[1], -1)
    for _ in range(_ITERATIONS):
        before, cluster = cluster, np.zeros(points.shape[1], dtype=np.int64)
        squares = _squares(points, centres[0], sizes)
        for j in range(1, k):
            distance = _squares(points, centres[j], sizes)
            nearer = distance < squares
            cluster[nearer] = j
            np.minimum(squares, distance, out=squares)
        if np.array_equal(before, cluster):
            break
        member = cluster * n_groups + group
        count = np.bincount(member, minlength=k * n_groups).reshape(k, n_groups)
        for axis in range(d):
            total = np.bincount(member, weights=points[axis], minlength=k * n_groups).reshape(k, n_groups)
            centres[:, axis] = np.where(count > 0, total / np.maximum(count, 1), centres[:, axis])
    return cluster, squares


def _squares(points: np.ndarray, centres: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Squared distances `[N]` of points to the centre `[d, G]` of their group."""
    squares = np.zeros(points.shape[1])
    for along, centre in zip(points, centres, strict=True):
        offset = along - np.repeat(centre, sizes)
        offset *= offset
        squares += offset
    return squares
