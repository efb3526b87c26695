"""Recursive spectral partition of the attribution graph into supernodes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.sparse import csr_array

from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import AttributionGraph
from hagd.config.stages import HierarchyConfig
from hagd.hierarchy.affinity import (
    attribution_affinity,
    edge_affinity,
    influence_affinity,
    profile_affinity,
    target_affinity,
)
from hagd.hierarchy.division import arrange, divide
from hagd.hierarchy.quality import conductance, modularity
from hagd.hierarchy.records import Hierarchy, Level, nodes_key

_LARGEST = 0.95


def build_hierarchy(
    graph: AttributionGraph,
    config: HierarchyConfig,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    profile: np.ndarray | None = None,
) -> Hierarchy:
    """Divide every supernode into at most `branching` until none has more than `min_size` nodes.

    Level 0 has at most `branching` supernodes; each level refines the one before. Spectral splits may be uneven
    for `⌈log_b n⌉` levels; what is still too large then is divided evenly, so there are at most `2 ⌈log_b n⌉`
    levels. A graph of at most `min_size` nodes has one level of one supernode.

    Args:
        graph: its nodes are divided.
        config: affinity, branching and sizes.
        seed: of starting vectors and k-means.
        progress: called with the nodes that need no further division and all of them.
        profile: `[n_candidates, N]`, what each candidate does on each prompt (`hagd.hierarchy.activity`), which the
            affinities `effects` and `coactivation` compare.
    """
    w = _affinity(graph, config, profile)
    levels = partition(w, config, seed, progress)
    if config.affinity == "random":
        levels = shuffled(w, levels, seed)
    return Hierarchy(config.branching, levels, nodes_key(graph))


def build_prompt_hierarchy(graph: PromptGraph, config: HierarchyConfig, seed: int) -> Hierarchy:
    """The same division of one prompt's graph, by the influence that flows over its edges.

    `branching` and `min_size` of `config` are read: edges into different kinds of nodes have different units, and one
    prompt has no profiles to compare.
    """
    return Hierarchy(config.branching, partition(influence_affinity(graph), config, seed), nodes_key(graph))


def _affinity(graph: AttributionGraph, config: HierarchyConfig, profile: np.ndarray | None) -> csr_array:
    if config.affinity in ("edges", "random"):
        return edge_affinity(graph)
    if config.affinity == "attribution":
        return attribution_affinity(graph)
    if config.affinity == "targets":
        return target_affinity(graph, config.neighbours)
    assert profile is not None, f"{config.affinity} compares profiles"
    return profile_affinity(profile, len(graph.nodes), config.neighbours)


def partition(
    w: csr_array, config: HierarchyConfig, seed: int, progress: Callable[[int, int], None] | None = None
) -> tuple[Level, ...]:
    """The levels for the affinities `w` `[n, n]`, coarse to fine."""
    n = w.shape[0]
    rng = np.random.default_rng(seed)
    supernode = np.zeros(n, dtype=np.int64)
    levels: list[Level] = []
    uneven_levels = _levels_of(n, config.branching)
    blocks = arrange(w, supernode)
    while np.diff(blocks.bounds).max() > config.min_size:
        largest = _LARGEST if len(levels) < uneven_levels else 0.0
        child, gaps = divide(blocks, config.branching, config.min_size, largest, rng)
        supernode = np.empty(n, dtype=np.int64)
        parent = np.repeat(np.arange(len(blocks.bounds) - 1), np.diff(blocks.bounds))
        supernode[blocks.nodes] = np.unique(parent * config.branching + child, return_inverse=True)[1]
        levels.append(_level(w, supernode, gaps))
        blocks = arrange(w, supernode)
        if progress is not None:
            sizes = np.diff(blocks.bounds)
            progress(int(sizes[sizes <= config.min_size].sum()), n)
    return tuple(levels) or (_level(w, supernode, []),)


def _levels_of(n: int, branching: int) -> int:
    """`max(1, ⌈log_b n⌉)` in whole numbers; in floating point the logarithm of 125 to base 5 exceeds 3."""
    levels, places = 1, branching
    while places < n:
        levels, places = levels + 1, places * branching
    return levels


def shuffled(w: csr_array, levels: tuple[Level, ...], seed: int) -> tuple[Level, ...]:
    """The same supernodes with other members: one permutation of the nodes for all levels, which stay nested."""
    order = np.random.default_rng(seed).permutation(w.shape[0])
    return tuple(_level(w, level.supernode[order], []) for level in levels)


def _level(w: csr_array, supernode: np.ndarray, gaps: list[float]) -> Level:
    return Level(
        supernode=supernode,
        n_supernodes=int(supernode.max()) + 1,
        modularity=modularity(w, supernode),
        conductance=conductance(w, supernode),
        eigengap=float(np.mean(gaps)) if gaps else 0.0,
    )
