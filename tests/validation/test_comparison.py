"""A circuit is like itself, like none of other nodes, and figures agree with correlations taken one by one."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from hagd.pipeline.pipeline import Pipeline
from hagd.search.records import Circuit
from hagd.tasks.records import Prompts
from hagd.validation.activation_profiles import Side
from hagd.validation.comparison import Alignment, Matched, compare, effect_overlap
from hagd.validation.random_circuits import random_circuits, random_matched
from tests.builders import tiny_extract

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def pipeline(tiny_runs: Path) -> Pipeline:
    return Pipeline(tiny_extract(tiny_runs), QUIET)


@pytest.fixture(scope="module")
def side(pipeline: Pipeline) -> Side:
    return Side(pipeline.patched, pipeline.get("graph"), pipeline.get("search").circuits[-1])


@pytest.fixture(scope="module")
def splits(pipeline: Pipeline) -> tuple[list[Prompts], list[Prompts]]:
    task = pipeline.get("prompts")
    return [task.discovery], [task.validation, task.selection]


@pytest.fixture(scope="module")
def alignment(side: Side, splits: tuple[list[Prompts], list[Prompts]]) -> Alignment:
    return Alignment(side, side, *splits)


def activation(side: Side, row: int, prompts: list[Prompts]) -> np.ndarray:
    """Of one candidate at every place of its slot, prompt after prompt."""
    nodes, found = side.graph.nodes, []
    for split in prompts:
        features = side.patched.features(split.tokens[:, 0])[0]
        for i in range(len(split)):
            places = (split.slots[i, 0] == int(nodes.slot[row])).nonzero()[:, 0]
            layer = side.patched.transcoders.layers.index(int(nodes.layer[row]))
            found += features[layer, i, places, int(nodes.feature[row])].tolist()
    return np.array(found)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def test_a_circuit_and_itself(side: Side, splits: tuple[list[Prompts], list[Prompts]]) -> None:
    found = compare(side, side, *splits, n_null=40, n_bootstrap=20, seed=0).metrics
    for name in ("similarity", "cka", "overlap"):
        assert found[f"comparison.{name}"] == pytest.approx(1.0, abs=1e-5)
    assert found["comparison.similarity.low"] == pytest.approx(1.0, abs=1e-5)
    assert found["comparison.similarity_null"] < 0.95 and found["comparison.similarity_null.p"] == 1 / 41
    assert found["comparison.similarity_null.low"] <= found["comparison.similarity_null"]
    z = (1 - found["comparison.similarity_null"]) / found["comparison.similarity_null.z"]
    assert 0 < z < 0.5, "a standard deviation"


def test_without_nodes_that_vary_figures_are_undefined(side: Side, splits: tuple[list[Prompts], list[Prompts]]) -> None:
    nothing = replace(side, circuit=Circuit(np.zeros(0, dtype=int)))
    found = compare(nothing, nothing, *splits, n_null=2, n_bootstrap=10, seed=0).metrics
    assert found["comparison.nodes"] == 0
    for name in ("similarity", "similarity.low", "cka", "overlap", "overlap_null", "overlap_null.z"):
        assert np.isnan(found[f"comparison.{name}"])


def test_the_order_of_nodes_does_not_matter(side: Side, alignment: Alignment) -> None:
    one, two = (side.rows(each) for each in random_circuits(side.graph, 16, 2, 0))
    rows = alignment.counted((one, two))
    rng = np.random.default_rng(0)
    mixed = (rng.permutation(rows[0]), rng.permutation(rows[1]))
    assert alignment.similarity(mixed) == pytest.approx(alignment.similarity(rows))
    assert alignment.cka(mixed) == pytest.approx(alignment.cka(rows))
    assert alignment.similarity(rows) == pytest.approx(alignment.similarity((rows[1], rows[0])), abs=1e-6)
    assert effect_overlap(side, side, mixed) == pytest.approx(effect_overlap(side, side, rows))


def test_random_circuits_are_as_alike_as_random_ones(side: Side, splits: tuple[list[Prompts], list[Prompts]]) -> None:
    """Two draws of the null against the null: z of some standard deviations, p anywhere."""
    (first,), (second,) = (random_matched(side.graph, side.circuit, 1, seed) for seed in (5, 6))
    one, two = (Side(side.patched, side.graph, circuit) for circuit in (first, second))
    found = compare(one, two, *splits, n_null=60, n_bootstrap=10, seed=0).metrics
    assert abs(found["comparison.similarity_null.z"]) < 4 and found["comparison.similarity_null.p"] > 1 / 61


def test_similarity_is_the_best_matching_found_by_trying_all(
    side: Side, alignment: Alignment, splits: tuple[list[Prompts], list[Prompts]]
) -> None:
    nodes, n = side.graph.nodes, side.graph.n_candidates
    slot = int(np.bincount(nodes.slot[:n]).argmax())
    usable = alignment.counted((np.flatnonzero(nodes.slot[:n] == slot),) * 2)[0]
    one, two = usable[:3], usable[2:6]
    fit = {
        (i, j): correlation(activation(side, i, splits[0]), activation(side, j, splits[0])) for i in one for j in two
    }
    best = max(permutations(two, 3), key=lambda js: sum(max(fit[i, j], 0) for i, j in zip(one, js, strict=True)))
    total = sum(
        correlation(activation(side, i, splits[1]), activation(side, j, splits[1]))
        for i, j in zip(one, best, strict=True)
        if fit[i, j] > 0
    )
    assert alignment.similarity((one, two)) == pytest.approx(2 * total / 7, abs=1e-5)


def test_cka_is_that_of_gram_matrices(
    side: Side, alignment: Alignment, splits: tuple[list[Prompts], list[Prompts]]
) -> None:
    nodes, n = side.graph.nodes, side.graph.n_candidates
    slot = int(np.bincount(nodes.slot[:n]).argmax())
    usable = alignment.counted((np.flatnonzero(nodes.slot[:n] == slot),) * 2)[0]
    grams = []
    for rows in (usable[:4], usable[3:9]):
        values = np.stack([activation(side, row, splits[1]) for row in rows], 1)
        values = (values - values.mean(0)) / values.std(0)
        grams.append(values @ values.T)
    k, other = grams
    wanted = (k * other).sum() / np.sqrt((k * k).sum() * (other * other).sum())
    assert alignment.cka((usable[:4], usable[3:9])) == pytest.approx(wanted, abs=1e-5)


def test_resampled_prompts_count_as_often_as_drawn(
    side: Side, alignment: Alignment, splits: tuple[list[Prompts], list[Prompts]]
) -> None:
    rows = alignment.counted((side.rows(side.circuit),) * 2)
    n = sum(map(len, splits[1]))
    assert alignment.matched(alignment.match(rows), np.arange(n)) == pytest.approx(len(rows[0]), abs=1e-5)
    nodes = side.graph.nodes
    slot = int(np.bincount(nodes.slot[: side.graph.n_candidates]).argmax())
    group = np.flatnonzero(nodes.slot[: side.graph.n_candidates] == slot)
    one, two = alignment.counted((group, group))[0][:2]
    drawn = np.random.default_rng(0).integers(0, n, 3 * n)
    by_prompt = [activation(side, row, splits[1]).reshape(n, -1)[drawn].ravel() for row in (one, two)]
    pair = Matched((False, slot), *(np.searchsorted(group, [row]) for row in (one, two)))
    assert alignment.matched([pair], drawn) == pytest.approx(correlation(*by_prompt), abs=1e-6)


def test_overlap_counts_effect_by_slot_and_depth(side: Side) -> None:
    nodes = side.graph.nodes
    low, high = (np.flatnonzero(nodes.layer[: side.graph.n_candidates] == layer) for layer in (0, 1))
    assert effect_overlap(side, side, (low, high)) == 0.0
    assert effect_overlap(side, side, (low, low)) == pytest.approx(1.0)
    mixed = np.concatenate([low[:1], high[:1]])
    weight = np.abs(nodes.attribution[mixed])
    share = float(weight[0] / weight.sum())
    assert effect_overlap(side, side, (low[:1], mixed)) == pytest.approx(share / (2 - share))


def test_draws_match_layer_slot_and_class(side: Side) -> None:
    graph = side.graph
    classes = np.arange(graph.n_candidates) % 3
    nodes = graph.nodes
    cells = list(zip(nodes.layer.tolist(), nodes.slot.tolist(), classes.tolist(), strict=False))
    circuit = Circuit(np.sort(graph.flat[:12]))
    wanted = sorted(cells[row] for row in side.rows(circuit))
    for draw in random_matched(graph, circuit, 5, 0, classes):
        assert sorted(cells[row] for row in side.rows(draw)) == wanted
    assert all(len(set(draw.nodes)) == 9 for draw in random_circuits(graph, 9, 3, 0))
