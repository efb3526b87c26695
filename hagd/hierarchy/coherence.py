"""Causal coherence: are the members of a supernode alike in what interventions on them do?

Shape legend: n nodes, N prompts.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from hagd.hierarchy.records import Hierarchy

_DRAWS = 50


class Coherence(NamedTuple):
    """Attributes:
    found: mean correlation between effects of members of one supernode, mean over members.
    null: the same for random groups of the same sizes, mean over draws.
    spread: standard deviation over those draws.
    """

    found: float
    null: float
    spread: float


def coherence(
    effects: np.ndarray, supernode: np.ndarray, rng: np.random.Generator, strata: np.ndarray | None = None
) -> Coherence:
    """Coherence of groups of nodes; NaN where no group has two nodes with effects that vary.

    Args:
        effects: `[n, N]`, effect of each node's ablation on each prompt.
        supernode: int64 `[n]`, the group of each node.
        rng: of the permutations behind the null.
        strata: `[n]`, nodes are exchanged only with nodes of the same stratum; None exchanges all.
    """
    centred = effects - effects.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(centred, axis=1)
    moving = norms > 1e-9 * max(float(norms.max(initial=0)), 1e-30)
    unit = centred[moving] / norms[moving, None]
    group = np.unique(supernode[moving], return_inverse=True)[1]
    if len(unit) == 0 or np.bincount(group).max() < 2:
        return Coherence(float("nan"), float("nan"), float("nan"))
    stratum = np.zeros(len(unit)) if strata is None else strata[moving]
    draws = [_within(unit, _permuted(group, stratum, rng)) for _ in range(_DRAWS)]
    return Coherence(_within(unit, group), float(np.mean(draws)), float(np.std(draws)))


def with_coherence(hierarchy: Hierarchy, effects: np.ndarray, rows: np.ndarray, rng: np.random.Generator) -> Hierarchy:
    """The same with the coherence of every level, of the nodes `rows` with `effects` `[len(rows), N]`."""
    levels = []
    for level in hierarchy.levels:
        found = coherence(effects, level.supernode[rows], rng)
        levels.append(replace(level, coherence=found.found, coherence_null=found.null))
    return replace(hierarchy, levels=tuple(levels))


def _within(unit: np.ndarray, group: np.ndarray) -> float:
    """`Σ_g n_g c_g / Σ_g n_g` over groups of two or more, with `c_g` the mean correlation of two members."""
    n = len(group)
    sums = csr_array((np.ones(n), (group, np.arange(n)))) @ unit
    size = np.bincount(group)
    several = size >= 2
    size = size[several]
    correlation = ((sums[several] ** 2).sum(axis=1) - size) / (size * (size - 1))
    return float((size * correlation).sum() / size.sum())


def _permuted(group: np.ndarray, stratum: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`group` exchanged at random within each stratum."""
    before = np.argsort(stratum, kind="stable")
    after = np.lexsort((rng.random(len(group)), stratum))
    permuted = np.empty_like(group)
    permuted[before] = group[after]
    return permuted
