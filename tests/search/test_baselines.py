from __future__ import annotations

import numpy as np
import pytest
import torch

from hagd.attribution.node_attribution import attribute_nodes
from hagd.config.stages import GraphConfig
from hagd.search.baselines import by_attribution, by_chance, by_greedy_pruning, by_method
from tests.search.trained import Trained


def test_the_attribution_of_the_graph_is_not_computed_again(trained: Trained) -> None:
    before = trained.objective.patched.evaluations
    ranking = by_method(trained.objective, trained.graph, GraphConfig(), "integrated_gradients")
    assert trained.objective.patched.evaluations == before
    assert np.array_equal(ranking, by_attribution(trained.graph))


def test_another_attribution_is_the_one_it_says(trained: Trained) -> None:
    ranking = by_method(trained.objective, trained.graph, GraphConfig(), "gradient_activation")
    direct = attribute_nodes(trained.objective, GraphConfig(attribution="gradient_activation")).importance
    assert ranking == pytest.approx(direct.flatten()[trained.flat].numpy())
    assert not np.allclose(ranking, by_attribution(trained.graph))


def test_chance_ranks_every_candidate_once(trained: Trained) -> None:
    first, again, other = (by_chance(trained.graph, seed) for seed in (0, 0, 1))
    assert sorted(first) == list(range(trained.graph.n_candidates))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_greedy_pruning_ranks_by_measured_rises(trained: Trained) -> None:
    seen: list[tuple[int, int]] = []
    before = trained.objective.patched.evaluations
    rises = by_greedy_pruning(
        trained.objective,
        trained.graph,
        torch.Generator().manual_seed(0),
        64,
        lambda done, total: seen.append((done, total)),
    )
    n = trained.graph.n_candidates
    assert seen[-1] == (n, n)
    assert trained.objective.patched.evaluations - before == (n + 2) * len(trained.objective)
    # The first visited node is ablated with everything else kept: its rise can be checked by hand.
    first = int(np.argsort(by_attribution(trained.graph), kind="stable")[0])
    everything = torch.arange(n)
    alone = trained.divergence(everything[everything != first]) - trained.divergence(everything)
    assert rises[first] == pytest.approx(alone, abs=1e-5)


def test_greedy_pruning_beats_chance(trained: Trained) -> None:
    size = trained.graph.n_candidates // 4
    greedy = by_greedy_pruning(trained.objective, trained.graph, torch.Generator().manual_seed(0), 64)
    ours = trained.divergence(torch.as_tensor(np.argsort(-greedy)[:size].copy()))
    chance = [
        trained.divergence(torch.as_tensor(np.argsort(-by_chance(trained.graph, seed))[:size].copy()))
        for seed in range(5)
    ]
    assert ours < 0.7 * min(chance)
