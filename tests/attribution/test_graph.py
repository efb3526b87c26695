from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from hagd.attribution.direct_edges import DirectEdges
from hagd.attribution.graph import build_graph, candidate_nodes
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import ERROR, FEATURE, HEAD, LOGIT, TOKEN, Attribution, AttributionGraph
from hagd.attribution.total_edges import TotalEdges
from hagd.config.stages import GraphConfig
from hagd.models.linear_parts import linear_attention
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import TaskData
from tests.builders import patched_model, random_model, random_transcoders, tiny_task
from tests.reference import heads_of

TASK = tiny_task()
LAYERS = (0, 2)


@cache
def attributed() -> tuple[PatchedModel, TaskData, Attribution]:
    lm = random_model("gpt2", n_layers=3)
    patched = patched_model(lm, random_transcoders(lm, layers=LAYERS), TASK.discovery)
    target = Objective(patched, TASK, TASK.discovery, ablation="mean", error="mean", batch_size=64)
    return patched, TASK, attribute_nodes(target, GraphConfig())


def graph(**config: Any) -> AttributionGraph:
    patched, task, attribution = attributed()
    return build_graph(patched, task, task.discovery, attribution, GraphConfig(**config))


def identity(found: AttributionGraph) -> list[tuple[int, ...]]:
    nodes = found.nodes
    return list(zip(*(x.tolist() for x in (nodes.kind, nodes.layer, nodes.slot, nodes.feature)), strict=True))


@pytest.mark.parametrize("n_max", [5, 20, 10_000])
def test_the_most_important_live_features_come_first(n_max: int) -> None:
    patched, _, attribution = attributed()
    found = graph(n_max=n_max)
    live = torch.where(attribution.live, attribution.importance, -1).flatten()
    assert found.n_candidates == min(n_max, int(attribution.live.sum())) == int((found.nodes.kind == FEATURE).sum())
    assert len(set(found.flat.tolist())) == found.n_candidates
    assert live[found.flat].tolist() == live.sort(descending=True).values[: found.n_candidates].tolist()
    for i, position in enumerate(found.flat.tolist()):
        layer, slot, feature = np.unravel_index(position, patched.gate_shape)
        assert identity(found)[i] == (FEATURE, LAYERS[layer], slot, feature)
        assert found.nodes.attribution[i] == attribution.signed[layer, slot, feature].item()
        assert found.nodes.importance[i] == attribution.importance[layer, slot, feature].item()
        assert found.nodes.mean[i] == patched.means.features[layer, slot, feature].item()
        assert found.nodes.frequency[i] == patched.means.frequency[layer, slot, feature].item()


def test_heads_compete_with_features() -> None:
    lm = random_model("gpt2", n_layers=3)
    patched = patched_model(lm, random_transcoders(lm, layers=LAYERS), TASK.discovery, head_layers=(1, 2))
    target = Objective(patched, TASK, TASK.discovery, ablation="mean", error="mean", batch_size=64)
    attribution = attribute_nodes(target, GraphConfig())
    live = torch.where(attribution.live, attribution.importance, -1)
    assert live.shape == patched.gate_shape == (2 * 3 * 12 + 2 * 3 * 4,)
    found = build_graph(patched, TASK, TASK.discovery, attribution, GraphConfig(n_max=30, edges_per_node=5))
    nodes = found.nodes
    assert live[found.flat].tolist() == live.sort(descending=True).values[:30].tolist()
    assert nodes.importance[:30].tolist() == live[found.flat].tolist()
    heads = np.flatnonzero(nodes.kind == HEAD)
    assert 0 < len(heads) < 30 and heads.max() < 30 and len(set(identity(found))) == len(nodes)
    part = torch.stack([linear_attention(lm, layer, torch.float32).W_O for layer in (1, 2)])
    for row in heads.tolist():
        layer, slot, head = (int(x[row]) for x in (nodes.layer, nodes.slot, nodes.feature))
        assert found.flat[row] == 72 + ((layer - 1) * 3 + slot) * 4 + head and nodes.frequency[row] == 1
        z = heads_of(lm, TASK.discovery.tokens[:, 0], (layer,))[0, :, slot, head].mean(0)
        assert nodes.mean[row] == pytest.approx((z @ part[layer - 1, head]).norm().item(), rel=1e-4)
        into = found.edge_attr[found.edge_index[1] == row]
        assert 0 < len(into) <= 5
    source, target_of = found.edge_index
    assert (nodes.kind[source] == HEAD).any() and len(found.flat) == found.n_candidates == 30
    # a head of a layer comes before the MLP of that layer
    assert (nodes.layer[source] <= nodes.layer[target_of]).all()
    same = nodes.layer[source] == nodes.layer[target_of]
    assert set(nodes.kind[source[same]]) == {HEAD} and set(nodes.kind[target_of[same]]) == {FEATURE}


def test_a_dead_feature_is_no_candidate_however_important() -> None:
    patched, task, old = attributed()
    importance = old.importance.clone()
    dead = (~old.live).nonzero()[0]
    importance[tuple(dead)] = 1e6
    nodes, flat = candidate_nodes(Attribution(old.signed, importance, old.live), patched, task.discovery, 10_000)
    assert len(flat) == int(old.live.sum()) < old.live.numel()
    assert old.live.flatten()[flat].all() and len(nodes) == len(set(identity(graph())))


def test_every_node_is_there_once_and_other_kinds_follow() -> None:
    found = graph(n_max=10)
    ids = identity(found)
    assert len(set(ids)) == len(ids) == len(found.nodes)
    rest = ids[found.n_candidates :]
    # the MLP of layer 1 has no dictionary: all that it writes is an error term
    assert rest == [
        *((ERROR, layer, slot, 0) for layer in (0, 1, 2) for slot in range(3)),
        *((TOKEN, -1, slot, 0) for slot in range(3)),
        (LOGIT, 3, 2, 0),
    ]


@pytest.mark.parametrize("edges", ["direct", "total"])
@pytest.mark.parametrize("edges_per_node", [1, 3, 1000])
def test_edges_are_the_strongest_into_each_target(edges: str, edges_per_node: int) -> None:
    patched, task, _ = attributed()
    found = graph(n_max=30, edges=edges, edges_per_node=edges_per_node)
    method = DirectEdges if edges == "direct" else TotalEdges
    all_edges = method(patched, task, task.discovery, found.nodes, "mean")
    source, target = found.edge_index
    assert found.edge_attr.dtype == np.float32 and found.edge_index.dtype == np.int64
    assert len(set(zip(source.tolist(), target.tolist(), strict=True))) == len(source)
    n_edges = 0
    for node in range(len(found.nodes)):
        into = target == node
        if found.nodes.kind[node] not in (FEATURE, LOGIT):
            assert not into.any()
            continue
        sources, effects = all_edges.column(node)
        strength = dict(zip(sources.tolist(), effects.tolist(), strict=True))
        kept = dict(zip(source[into].tolist(), found.edge_attr[into].tolist(), strict=True))
        possible = sorted((abs(value) for value in strength.values() if value), reverse=True)
        limit = edges_per_node if found.nodes.kind[node] == FEATURE else len(possible)
        assert sorted(map(abs, kept.values()), reverse=True) == pytest.approx(possible[:limit])
        assert all(value == pytest.approx(strength[i]) for i, value in kept.items())
        n_edges += len(kept)
    assert n_edges == len(source) > 0


@pytest.mark.parametrize("edges", ["direct", "total"])
def test_edges_point_upwards(edges: str) -> None:
    found = graph(edges=edges)
    source, target = found.edge_index
    layer, kind, slot = found.nodes.layer, found.nodes.kind, found.nodes.slot
    assert (layer[source] < layer[target]).all()
    assert not (kind[source] == LOGIT).any() and set(kind[target]) == {FEATURE, LOGIT}
    assert (slot[source] <= slot[target]).all(), "attention is causal and every slot is one position here"


def test_edges_are_means_over_the_edge_prompts() -> None:
    patched, task, attribution = attributed()
    config = GraphConfig(n_max=10, edge_prompts=4)
    seen: list[tuple[int, int]] = []
    found = build_graph(
        patched, task, task.discovery, attribution, config, lambda done, total: seen.append((done, total))
    )
    first = build_graph(patched, task, task.discovery[:4], attribution, config)
    assert np.array_equal(found.edge_attr, first.edge_attr) and np.array_equal(found.edge_index, first.edge_index)
    assert not np.array_equal(found.edge_attr, graph(n_max=10).edge_attr)
    assert seen == [(i, 11) for i in range(1, 12)]


def test_a_model_without_live_features_has_a_graph() -> None:
    patched, task, old = attributed()
    dead = Attribution(old.signed, old.importance, torch.zeros_like(old.live))
    found = build_graph(patched, task, task.discovery, dead, GraphConfig())
    assert found.n_candidates == 0 and set(found.edge_index[1]) == {len(found.nodes) - 1}
