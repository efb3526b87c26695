from __future__ import annotations

import warnings
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.cluster.vq import kmeans2

from hagd.hierarchy.kmeans import grouped_kmeans


def inertia(points: np.ndarray, cluster: np.ndarray) -> float:
    return sum(float(((points[cluster == c] - points[cluster == c].mean(0)) ** 2).sum()) for c in set(cluster))


def best_of_scipy(points: np.ndarray, k: int) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = [kmeans2(points, k, minit="++", iter=20, rng=np.random.default_rng(seed))[1] for seed in range(10)]
    return min(inertia(points, run) for run in runs)


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_clustered_as_well_as_by_scipy(seed: int) -> None:
    """Four groups of three blobs each, of unequal sizes, in one call."""
    rng = np.random.default_rng(seed)
    sizes = [30, 90, 45, 60]
    points = [np.repeat(4 * rng.standard_normal((3, 2)), size // 3, axis=0) for size in sizes]
    points = [p + 0.5 * rng.standard_normal(p.shape) for p in points]
    bounds = np.cumsum([0, *sizes])
    found = grouped_kmeans(np.concatenate(points), bounds, 3, np.random.default_rng(0))
    ours = [inertia(p, c) for p, c in zip(points, np.split(found, bounds[1:-1]), strict=True)]
    theirs = [best_of_scipy(p, 3) for p in points]
    assert sum(ours) <= 1.1 * sum(theirs)


@given(sizes=st.lists(st.integers(1, 20), min_size=1, max_size=6), k=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_point_is_with_the_nearest_mean_of_its_group(sizes: list[int], k: int, seed: int) -> None:
    """A fixed point of Lloyd's iteration, group by group; identical points are no obstacle."""
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 4, size=(sum(sizes), 2)).astype(float)
    bounds = np.cumsum([0, *sizes])
    found = grouped_kmeans(points, bounds, k, np.random.default_rng(seed))
    assert found.min() >= 0 and found.max() < k
    for start, stop in pairwise(bounds.tolist()):
        own, cluster = points[start:stop], found[start:stop]
        means = {c: own[cluster == c].mean(0) for c in set(cluster.tolist())}
        for point, c in zip(own, cluster.tolist(), strict=True):
            nearest = min(float(((point - mean) ** 2).sum()) for mean in means.values())
            assert ((point - means[c]) ** 2).sum() <= nearest + 1e-9
    again = grouped_kmeans(points, bounds, k, np.random.default_rng(seed))
    assert np.array_equal(found, again)
