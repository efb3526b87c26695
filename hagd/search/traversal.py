"""Coarse-to-fine traversal: group tests of supernodes that find what is idle with few model evaluations.

Supernodes of a level are ablated one at a time, many in one batch, on top of the supernodes already known to be
idle; those that change the model least are then ablated together, as many as the tolerance allows (found by
bisection). The rest is opened and tested at the next level. Nothing is dropped for good: idle nodes only enter the
next part of the search at the lowest ranks (without elimination, with closed gates), from where gradients can lift them
again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.records import AttributionGraph
from hagd.hierarchy.records import Hierarchy
from hagd.patching.objective import Objective
from hagd.search.gates import losses_of

_PROMPTS = 64


@dataclass(frozen=True)
class Traversal:
    """What group tests found.

    Attributes:
        idle: bool `[n_candidates]`, nodes that can all be ablated together within the tolerance.
        tested: supernodes tested, over all levels.
        levels: levels that the budget reached.
    """

    idle: np.ndarray
    tested: int
    levels: int


def find_idle(
    objective: Objective,
    graph: AttributionGraph,
    hierarchy: Hierarchy,
    *,
    tolerance: float,
    budget: float,
    generator: torch.Generator,
) -> Traversal:
    """Idle nodes by group tests, from the coarsest level down until `budget` evaluations are spent.

    Args:
        objective: the discovery split; tests use a sample of it.
        graph: its candidates are the nodes.
        hierarchy: levels of supernodes.
        tolerance: share of what ablating all candidates adds to the divergence that ablating all idle ones may add.
        budget: model evaluations, in units of the whole discovery split.
        generator: of the prompt sample.

    Raises:
        ArtifactError: the hierarchy was built for other nodes.
    """
    hierarchy.require(graph)
    flat = torch.as_tensor(graph.flat)
    index = objective.sample(_PROMPTS, generator)
    share = len(index) / len(objective)
    idle = np.zeros(graph.n_candidates, dtype=bool)
    spent, tested, reached = 2 * share + objective.unmeasured, 0, 0
    if spent > budget:
        return Traversal(idle, tested, reached)
    # Errors are ablated too, so that keeping every candidate already costs something.
    everything, nothing = losses_of(objective, flat, np.stack([~idle, idle]), index).tolist()
    allowed = everything + tolerance * max(nothing - everything, 0.0)
    for level in hierarchy.levels:
        groups = _open_groups(level.supernode[: graph.n_candidates], idle)
        cost = share * (len(groups) + np.ceil(np.log2(len(groups) + 1)))
        if not groups or spent + cost > budget:
            break
        removals = np.stack([_without(idle, group) for group in groups])
        order = np.argsort(losses_of(objective, flat, removals, index), kind="stable").tolist()
        n_idle, bisections = _largest_prefix(objective, [groups[i] for i in order], idle, allowed, flat, index)
        for i in order[:n_idle]:
            idle[groups[i]] = True
        spent += share * (len(groups) + bisections)
        tested, reached = tested + len(groups), reached + 1
    return Traversal(idle, tested, reached)


def _open_groups(supernode: np.ndarray, idle: np.ndarray) -> list[np.ndarray]:
    """Members of every supernode that are not known to be idle."""
    live = np.flatnonzero(~idle)
    order = live[np.argsort(supernode[live], kind="stable")]
    cuts = np.flatnonzero(np.diff(supernode[order])) + 1
    return [group for group in np.split(order, cuts) if len(group)]


def _without(idle: np.ndarray, group: np.ndarray) -> np.ndarray:
    kept = ~idle
    kept[group] = False
    return kept


def _largest_prefix(
    objective: Objective,
    groups: list[np.ndarray],
    idle: np.ndarray,
    allowed: float,
    flat: Tensor,
    index: Tensor,
) -> tuple[int, int]:
    """How many of the first groups can be ablated together within `allowed`, and the tests that took."""
    low, high, tests = 0, len(groups), 0
    while low < high:
        middle = (low + high + 1) // 2
        kept = _without(idle, np.concatenate(groups[:middle]))
        tests += 1
        if float(losses_of(objective, flat, kept[None], index)[0]) <= allowed:
            low = middle
        else:
            high = middle - 1
    return low, tests
