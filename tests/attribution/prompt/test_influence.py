"""Influence and pruning, edge by edge on disk, against dense matrices and the whole series."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hagd.attribution.prompt import edge_file
from hagd.attribution.prompt.edge_file import EdgeWriter, StoredEdges
from hagd.attribution.prompt.graph import cumulative_shares
from hagd.attribution.prompt.influence import pass_down, prune, smallest_kept

N_FEATURES, N_ERRORS, N_TOKENS, N_LOGITS = 30, 6, 4, 3
FIRST_TOKEN, N_SOURCES = N_FEATURES + N_ERRORS, N_FEATURES + N_ERRORS + N_TOKENS
N = N_SOURCES + N_LOGITS


def random_edges(folder: Path, seed: int = 0) -> tuple[StoredEdges, np.ndarray, np.ndarray]:
    """Edges, the same as a matrix (rows are targets), and weights; features of three layers of ten."""
    g = np.random.default_rng(seed)
    dense = np.zeros((N, N), dtype=np.float32)
    with EdgeWriter(folder) as writer:
        for layer in (3, 2, 1, 0):
            targets = np.arange(N_SOURCES, N) if layer == 3 else np.arange(10 * layer, 10 * layer + 10)
            below = np.concatenate([np.arange(10 * layer), np.arange(N_FEATURES, N_SOURCES)])
            for part in np.split(targets, [2]):
                values = g.standard_normal((len(part), len(below))).astype(np.float32) ** 3
                values[:, g.random(len(below)) < 0.3] = 0
                dense[np.ix_(part, below)] = values
                writer.append(layer, part, below, values)
        edges = writer.stored()
    weights = np.zeros(N)
    weights[N_SOURCES:] = [0.6, 0.2, 0.1]
    return edges, dense, weights


def series(dense: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """`Σ_t w Âᵗ` until nothing is left."""
    share = np.abs(dense) / np.maximum(np.abs(dense).sum(1, keepdims=True), 1e-10)
    total, step = np.zeros(N), weights @ share
    while step.any():
        total += step
        step = step @ share
    return total


def cutoff(scores: np.ndarray, share: float) -> float:
    ordered = np.sort(scores)[::-1]
    return float(ordered[min(np.searchsorted(ordered.cumsum() / ordered.sum(), share), len(ordered) - 1)])


@pytest.mark.parametrize("at_once", [1, 40, 2**20])
def test_one_pass_down_is_the_whole_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(edge_file, "_AT_ONCE", at_once)
    edges, dense, weights = random_edges(tmp_path)
    np.testing.assert_allclose(pass_down(edges, weights), series(dense, weights), rtol=1e-6)
    kept = np.random.default_rng(1).random(N) < 0.6
    kept[N_SOURCES:] = True
    left = np.where(kept[:, None] & kept, dense, 0)
    np.testing.assert_allclose(pass_down(edges, weights, kept), series(left, weights), rtol=1e-6)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.98, 1.0])
def test_the_smallest_kept_is_found_without_sorting_everything(share: float) -> None:
    scores = np.random.default_rng(2).lognormal(sigma=4, size=1000)
    assert smallest_kept(scores, share) == pytest.approx(cutoff(scores, share), rel=1e-12)
    assert smallest_kept(np.ones(7), share) == 1.0


@pytest.mark.parametrize(("node_share", "edge_share"), [(0.8, 0.98), (0.4, 0.6), (1.0, 1.0)])
@pytest.mark.parametrize("seed", range(4))
def test_pruning_is_that_of_circuit_tracer(tmp_path: Path, seed: int, node_share: float, edge_share: float) -> None:
    """`circuit_tracer.graph.prune_graph` (0.5.0), in NumPy."""
    edges, dense, weights = random_edges(tmp_path, seed)
    influence = series(dense, weights)
    nodes = influence >= cutoff(influence, node_share)
    nodes[FIRST_TOKEN:] = True
    left = np.where(nodes[:, None] & nodes, dense, 0)
    share = np.abs(left) / np.maximum(np.abs(left).sum(1, keepdims=True), 1e-10)
    scores = share * (series(left, weights) + weights)[:, None]
    strong = (scores >= cutoff(scores.flatten(), edge_share)) & (scores > 0)
    before = None
    while before is None or (before != nodes).any():
        before = nodes.copy()
        nodes[:FIRST_TOKEN] &= strong[:, :FIRST_TOKEN].any(0)
        nodes[:N_FEATURES] &= strong[:N_FEATURES].any(1)
        strong[~nodes] = False
        strong[:, ~nodes] = False
    ordered = sorted(influence, reverse=True)
    cumulative = [sum(ordered[: ordered.index(each) + 1]) / sum(ordered) for each in influence if each > 0]
    np.testing.assert_allclose(cumulative_shares(influence)[influence > 0], cumulative, rtol=1e-9)
    found = prune(
        edges,
        weights,
        pass_down(edges, weights),
        n_inner=N_FEATURES,
        first_token=FIRST_TOKEN,
        node_share=node_share,
        edge_share=edge_share,
    )
    assert np.array_equal(found.nodes, nodes) and nodes[:N_FEATURES].sum() > 0
    expected = sorted(zip(*(x.tolist() for x in strong.nonzero()), strict=True))
    assert sorted(zip(found.target.tolist(), found.source.tolist(), strict=True)) == expected
    np.testing.assert_array_equal(found.value, dense[found.target, found.source])
    np.testing.assert_allclose(found.flow, scores[found.target, found.source], rtol=1e-6)
