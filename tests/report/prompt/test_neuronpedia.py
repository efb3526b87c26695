from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
from made_prompt_graph import ROWS, made_graph, made_report

from hagd.attribution.records import FEATURE, HEAD
from hagd.config.stages import GraphPruningConfig
from hagd.report.prompt.neuronpedia import neuronpedia_graph, slug
from hagd.report.records import HierarchyLevel, SupernodeView

REQUIRED = {  # `graph-schema.json` of Neuronpedia
    "metadata": {"slug": str, "scan": str, "prompt_tokens": list, "prompt": str},
    "node": {
        "node_id": str,
        "feature": int,
        "layer": str,
        "ctx_idx": int,
        "feature_type": str,
        "jsNodeId": str,
        "clerp": str,
    },
    "link": {"source": str, "target": str, "weight": float},
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    graph = made_graph()
    written = json.dumps(neuronpedia_graph(graph, made_report(graph), GraphPruningConfig()), allow_nan=False)
    content: dict[str, Any] = json.loads(written)
    return content


def unpaired(number: int) -> tuple[int, int]:
    """Layer and feature, as the viewers take a Cantor pairing apart."""
    w = (math.isqrt(8 * number + 1) - 1) // 2
    feature = number - w * (w + 1) // 2
    return w - feature, feature


def test_required_fields_have_the_types_of_the_schema(found: dict[str, Any]) -> None:
    assert set(found) == {"metadata", "qParams", "nodes", "links"}
    for kind, entries in (("metadata", [found["metadata"]]), ("node", found["nodes"]), ("link", found["links"])):
        for entry in entries:
            assert all(type(entry[name]) is expected for name, expected in REQUIRED[kind].items())
    assert found["metadata"]["node_threshold"] == 0.8 and found["metadata"]["schema_version"] == 1


def test_nodes_and_links_are_those_of_the_graph(found: dict[str, Any]) -> None:
    graph, nodes = made_graph(), found["nodes"]
    ids = [node["node_id"] for node in nodes]
    assert ids == ["0_1_2", "1_7_0", "1_7_2", "head_1_1_2", "error_1_2", "E_11_0", "E_13_2", "3_5_2", "3_6_2"]
    for node, (kind, layer, position, feature, value) in zip(nodes, ROWS, strict=True):
        assert node["ctx_idx"] == position
        assert node["activation"] == (value if kind == FEATURE else None)
        if kind == FEATURE:
            assert unpaired(node["feature"]) == (layer, feature) and node["layer"] == str(layer)
    assert [node["influence"] for node in nodes] == graph.nodes.cumulative.tolist()
    links = [(link["source"], link["target"], link["weight"]) for link in found["links"]]
    ends = [[ids[i] for i in side] for side in graph.edge_index.tolist()]
    assert links == list(zip(*ends, graph.edge_attr.tolist(), strict=True))


def test_logits_say_their_token_and_probability_as_the_viewers_read_it(found: dict[str, Any]) -> None:
    logits = [node for node in found["nodes"] if node["feature_type"] == "logit"]
    assert [node["clerp"] for node in logits] == ['Output "x"y" (p=0.750)', 'Output " z" (p=0.125)']
    assert [node["is_target_logit"] for node in logits] == [True, False]
    assert [float(node["clerp"].split("(p=")[1].split(")")[0]) for node in logits] == [0.75, 0.125]


def test_supernodes_hold_every_feature_and_head_once_under_distinct_labels(found: dict[str, Any]) -> None:
    supernodes = found["qParams"]["supernodes"]
    assert supernodes == [["same 1", "0_1_2", "1_7_0"], ["same 2", "1_7_2", "head_1_1_2"]]
    assert found["qParams"]["pinnedIds"] == ["0_1_2", "1_7_0", "1_7_2", "head_1_1_2", "3_5_2", "3_6_2"]
    assert sum(kind in (FEATURE, HEAD) for kind, *_ in ROWS) == 4


def test_levels_of_many_supernodes_are_passed_over() -> None:
    graph = made_graph()
    data = made_report(graph)
    many = HierarchyLevel(tuple(SupernodeView(str(i), 1, "a", "L0") for i in range(25)), 0.0, 0.0, 0.0)
    nodes = tuple(replace(node, supernodes=(*node.supernodes, node.id)) for node in data.nodes)
    deep = replace(data, levels=(*data.levels, many), nodes=nodes)
    chosen = neuronpedia_graph(graph, deep, GraphPruningConfig())["qParams"]["supernodes"]
    assert [label for label, *_ in chosen] == ["same 1", "same 2"]
    none = replace(data, levels=(), nodes=tuple(replace(node, supernodes=()) for node in data.nodes))
    assert neuronpedia_graph(graph, none, GraphPruningConfig())["qParams"]["supernodes"] == []


def test_slugs_fit_into_an_address() -> None:
    assert slug("some/Model-1.4b", "The capital of  Île is…") == "some-model-1-4b-the-capital-of-le-is"
    assert len(slug("m", "word " * 50)) <= 60 and not slug("m", "word " * 50).endswith("-")
