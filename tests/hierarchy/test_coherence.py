from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.hierarchy.coherence import coherence, with_coherence
from hagd.hierarchy.records import Hierarchy, Level


def slow_coherence(effects: np.ndarray, group: np.ndarray) -> float:
    """Mean correlation of two members, mean over members of groups of two or more."""
    values = []
    for g in sorted(set(group.tolist())):
        members = [i for i in np.flatnonzero(group == g) if effects[i].std() > 0]
        pairs = [np.corrcoef(effects[i], effects[j])[0, 1] for i in members for j in members if i != j]
        values += [float(np.mean(pairs))] * len(members) if pairs else []
    return float(np.mean(values))


@given(n=st.integers(4, 30), groups=st.integers(1, 3), seed=st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_coherence_is_that_of_loops(n: int, groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    effects = rng.standard_normal((n, 6))
    effects[0] = 1.0  # an effect that does not vary says nothing
    group = rng.integers(groups, size=n)
    group[1:3] = 0
    found = coherence(effects, group, rng)
    assert found.found == pytest.approx(slow_coherence(effects, group), abs=1e-9)


def test_nodes_that_act_alike_stand_out_from_random_groups() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 8)
    effects = rng.standard_normal((10, 40))[group] + rng.standard_normal((80, 40))
    planted = coherence(effects, group, rng)
    assert planted.found == pytest.approx(0.5, abs=0.1)
    assert planted.found > planted.null + 10 * planted.spread
    random = coherence(effects, rng.permutation(group), rng)
    assert abs(random.found - random.null) < 4 * random.spread


def test_strata_leave_the_likeness_of_strata_in_the_null() -> None:
    """Groups that follow from the stratum alone are no better than random ones within it."""
    rng = np.random.default_rng(0)
    stratum = np.repeat(np.arange(2), 40)
    effects = rng.standard_normal((2, 30))[stratum] + rng.standard_normal((80, 30))
    group = 2 * stratum + rng.integers(2, size=80)
    assert coherence(effects, group, rng).found > 0.4 > 2 * coherence(effects, group, rng).null
    matched = coherence(effects, group, rng, strata=stratum)
    assert abs(matched.found - matched.null) < 4 * matched.spread


def test_without_pairs_there_is_no_coherence() -> None:
    rng = np.random.default_rng(0)
    assert math.isnan(coherence(rng.standard_normal((4, 5)), np.arange(4), rng).found)
    assert math.isnan(coherence(np.ones((4, 5)), np.zeros(4, dtype=int), rng).found)


def test_levels_are_measured_on_the_nodes_that_were_ablated() -> None:
    rng = np.random.default_rng(0)
    fine, rows = np.array([0, 0, 1, 1, 2, 2, 2, 3]), np.array([0, 1, 4, 5, 6])
    effects = rng.standard_normal((5, 12))
    levels = (Level(np.zeros(8, dtype=np.int64), 1, 0, 0, 0), Level(fine, 4, 0, 0, 0))
    checked = with_coherence(Hierarchy(4, levels, ""), effects, rows, rng)
    for level in checked.levels:
        assert level.coherence == pytest.approx(slow_coherence(effects, level.supernode[rows]))
    assert checked.levels[0].coherence_null == pytest.approx(checked.levels[0].coherence), "one group has no other"
    assert np.array_equal(checked.levels[1].supernode, fine)
