from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.attribution.records import LOGIT
from hagd.config.stages import GraphConfig, SearchConfig
from hagd.hierarchy.records import Hierarchy
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.search.edge_pruning import EdgeModel
from hagd.search.find_circuit import Searched, find_circuit
from hagd.tasks.records import PADDING, Prompts
from tests.builders import patched_model, prompts_task, random_model, random_prompts, random_transcoders
from tests.patching.slow import at_scored, used
from tests.reference import encode, run, written_features
from tests.search.trained import Trained

CUTS = ((9, 2), (9, 7), (8, 1), (8, 4), (5, 0), (3, 2))
"""(reader, source), readers of later layers first; 9 is the logits."""


def tiny(cross_layer: bool = False) -> tuple[Objective, np.ndarray]:
    """Three layers, and as candidates the three features of each that differ most between prompts."""
    prompts = random_prompts(n=3)
    lm = random_model(n_layers=3, length=6)
    patched = patched_model(lm, random_transcoders(lm, cross_layer=cross_layer), prompts)
    order = torch.argsort(-patched.mean_activation.flatten() * (patched.frequency.flatten() < 0.8), stable=True)
    flat = np.concatenate([order[order // 36 == layer][:3].numpy() for layer in range(3)])  # 3 slots of 12 features
    task = prompts_task(prompts)
    return Objective(patched, task, prompts, ablation="mean", error="mean", batch_size=8), flat


def slow_logits(patched: PatchedModel, prompts: Prompts, flat: np.ndarray, reads: np.ndarray) -> Tensor:
    """One run a reader, wired by hand: sources that `reads` `[n + 1, n]` has write what they read in their own runs."""
    tokens, slots = prompts.tokens.flatten(0, 1), prompts.slots.flatten(0, 1)
    transcoders, means = patched.transcoders.transcoders, patched.means
    place = np.stack(np.unravel_index(flat, patched.gate_shape))

    @cache
    def run_of(reader: int) -> tuple[list[Tensor], Tensor]:
        read_by_layer: list[Tensor] = []
        writing: list[Tensor] = []

        def write(layer: int, read: Tensor, written: Tensor) -> Tensor:
            read_by_layer.append(encode(transcoders[layer], read))
            values, error = torch.zeros_like(read_by_layer[-1]), torch.zeros_like(written)
            for b, t in product(*map(range, slots.shape)):
                if slots[b, t] != PADDING:
                    values[b, t], error[b, t] = means.features[layer, slots[b, t]], means.errors[layer, slots[b, t]]
            for source in np.flatnonzero(reads[reader] & (place[0] == layer)):
                if reader == len(flat) or layer < place[0, reader]:
                    _, slot, feature = place[:, source]
                    own = run_of(source)[0][layer]
                    values[..., feature] = torch.where(slots == slot, own[..., feature], values[..., feature])
            writing.append(values)
            return written_features(patched.transcoders, layer, writing) + transcoders[layer].b_dec + error

        return read_by_layer, run(patched.lm, tokens, write=write).logits

    return at_scored(run_of(len(flat))[1], prompts)


@pytest.mark.parametrize("cross_layer", [False, True])
def test_every_cut_is_a_run_wired_by_hand(cross_layer: bool) -> None:
    objective, flat = tiny(cross_layer)
    patched, prompts = objective.patched, objective.prompts
    index = torch.arange(3)
    model = EdgeModel(objective, flat, index)
    reads, alive = np.ones((10, 9), dtype=bool), np.ones(9, dtype=bool)

    last = used(model.logits(), prompts)
    torch.testing.assert_close(last, slow_logits(patched, prompts, flat, reads), rtol=1e-4, atol=1e-5)
    for reader, source in CUTS:
        _, stay = model.cut(source, reader, alive)
        assert torch.equal(used(model.logits(), prompts), last), "a test alone cuts nothing"
        stay()
        reads[reader, source] = False
        found = used(model.logits(), prompts)
        torch.testing.assert_close(found, slow_logits(patched, prompts, flat, reads), rtol=1e-4, atol=1e-5)
        assert (found - last).abs().max() > 5e-4, "the edge matters"
        last = found


def test_the_edges_of_a_circuit_are_the_patched_model() -> None:
    """With all edges among its nodes and to the logits, and none from others."""
    objective, flat = tiny()
    index, alive = torch.arange(3), np.ones(9, dtype=bool)
    model = EdgeModel(objective, flat, index)
    for reader, source in product((9, 8, 6, 5, 4), (7, 3, 0)):  # these three are left out
        if model.layer_of[source] < model.layer_of[reader]:
            model.cut(source, reader, alive)[1]()
    gates = torch.zeros(2, *objective.patched.gate_shape)
    gates.view(2, -1)[:, flat] = 1.0
    gates.view(2, -1)[0, flat[[7, 3, 0]]] = 0.0
    circuit, everything = (used(objective.patched.logits(objective.prompts, each), objective.prompts) for each in gates)
    torch.testing.assert_close(used(model.logits(), objective.prompts), circuit, rtol=1e-4, atol=1e-5)
    assert (circuit - everything).abs().max() > 1e-2
    assert model.loss() == pytest.approx(float(objective.losses(gates[:1], index)[0]), rel=1e-4)


def test_nodes_rank_by_the_strongest_path_that_survives(trained: Trained) -> None:
    objective, graph, n = trained.objective, trained.graph, trained.graph.n_candidates
    source, target = graph.edge_index
    # All edges into the logits but those of some nodes, and every sixth of the others.
    kept = np.where(graph.nodes.kind[target] == LOGIT, source % 5 > 0, np.arange(len(target)) % 6 == 0)
    graph = replace(graph, edge_index=graph.edge_index[:, kept], edge_attr=graph.edge_attr[kept])
    hierarchy = Hierarchy(1, (), "")
    config = SearchConfig(method="greedy_edges", n_nodes=n // 4, greedy_prompts=8, sizes=())
    result = find_circuit(Searched(objective, objective, graph, hierarchy, GraphConfig()), config, 0)
    unread = np.setdiff1d(np.arange(n), graph.edge_index[0])
    direct = source[kept & (graph.nodes.kind[target] == LOGIT) & (source < n)]
    assert len(unread) > 3 and result.score[direct].min() > result.score[unread].max(), "no path, no strength"
    best = torch.as_tensor(np.argsort(-result.score)[: n // 4].copy())
    assert np.array_equal(result.circuit.nodes, np.sort(graph.flat[best]))
    chance = [trained.divergence(torch.as_tensor(np.random.default_rng(s).permutation(n)[: n // 4])) for s in range(5)]
    assert trained.divergence(best) < 0.7 * min(chance)
