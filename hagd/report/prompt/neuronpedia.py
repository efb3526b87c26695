"""The graph of one prompt in the layout that circuit-tracer's server and Neuronpedia show.

Fields as in `circuit_tracer.frontend.graph_models` (schema version 1: the number of a feature is the Cantor pairing of
its layer and index) and Neuronpedia's `graph-schema.json`. Two things differ from what circuit-tracer writes: the
supernodes of the hierarchy are filled in, and the ids of error nodes say so, because `0_LAYER_POSITION` is also the id
of a feature of layer 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import ERROR, FEATURE, HEAD, KIND_NAMES, LOGIT, TOKEN
from hagd.config.stages import GraphPruningConfig
from hagd.report.prompt.records import PromptReport
from hagd.report.wording import node_label

_MOST_SUPERNODES = 24
_SLUG_LENGTH = 60
_TYPES = {
    "feature": "cross layer transcoder",
    "head": "attention head",
    "error": "mlp reconstruction error",
    "token": "embedding",
    "logit": "logit",
}


def neuronpedia_graph(graph: PromptGraph, data: PromptReport, pruning: GraphPruningConfig) -> dict[str, Any]:
    """The file's content.

    Features and heads of a supernode are pinned together, those of the finest level that has at most 24 supernodes;
    logits are pinned too. `influence` is the cumulative share by which Neuronpedia's slider prunes.
    """
    ids = node_ids(graph)
    supernodes = _supernodes(graph, data, ids)
    logits = [i for i, kind in zip(ids, graph.nodes.kind.tolist(), strict=True) if kind == LOGIT]
    return {
        "metadata": {
            "slug": slug(data.model, data.prompt),
            "scan": data.model,
            "transcoder_list": [],
            "prompt_tokens": list(data.tokens),
            "prompt": data.prompt,
            "node_threshold": pruning.nodes,
            "schema_version": 1,
            "info": {"generator": {"name": "HAGD"}},
            "pruning_settings": {"node_threshold": pruning.nodes, "edge_threshold": pruning.edges},
        },
        "qParams": {
            "pinnedIds": [*(member for _, *members in supernodes for member in members), *logits],
            "supernodes": supernodes,
            "linkType": "both",
            "clickedId": "",
            "sg_pos": "",
        },
        "nodes": [_node(graph, data, row, ids[row]) for row in range(len(graph.nodes))],
        "links": [
            {"source": ids[source], "target": ids[target], "weight": weight}
            for source, target, weight in zip(*graph.edge_index.tolist(), graph.edge_attr.tolist(), strict=True)
        ],
    }


def node_ids(graph: PromptGraph) -> list[str]:
    """A distinct id of each node; those of features, tokens and logits are circuit-tracer's."""
    nodes = graph.nodes
    columns = (nodes.kind, nodes.layer, nodes.feature, nodes.position)
    patterns = {
        FEATURE: "{layer}_{feature}_{position}",
        HEAD: "head_{layer}_{feature}_{position}",
        ERROR: "error_{layer}_{position}",
        TOKEN: "E_{feature}_{position}",
        LOGIT: "{above}_{feature}_{position}",
    }
    return [
        patterns[kind].format(layer=layer, above=layer + 1, feature=feature, position=position)
        for kind, layer, feature, position in zip(*(column.tolist() for column in columns), strict=True)
    ]


def slug(model: str, prompt: str) -> str:
    """A name for the graph that may stand in an address."""
    words = re.sub(r"[^a-z0-9]+", "-", f"{model} {prompt}".lower()).strip("-")
    return words[:_SLUG_LENGTH].rstrip("-")


def _node(graph: PromptGraph, data: PromptReport, row: int, node_id: str) -> dict[str, Any]:
    nodes, view = graph.nodes, data.nodes[row]
    kind, layer, feature = (int(column[row]) for column in (nodes.kind, nodes.layer, nodes.feature))
    value, label = float(nodes.value[row]), node_label(view)
    number = {FEATURE: _cantor(layer, feature), ERROR: -1, TOKEN: int(nodes.position[row])}.get(kind, feature)
    return {
        "node_id": node_id,
        "feature": number,
        "layer": {TOKEN: "E", LOGIT: str(layer + 1)}.get(kind, str(layer)),
        "ctx_idx": int(nodes.position[row]),
        "feature_type": _TYPES[KIND_NAMES[kind]],
        "token_prob": value if kind == LOGIT else 0.0,
        "is_target_logit": kind == LOGIT and LOGIT not in nodes.kind[:row],
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-0" if kind == FEATURE else node_id,
        "clerp": f'Output "{label.removeprefix("logit ")}" (p={value:.3f})' if kind == LOGIT else label,
        "influence": float(nodes.cumulative[row]),
        "activation": value if kind == FEATURE else None,
    }


def _cantor(layer: int, feature: int) -> int:
    return (layer + feature) * (layer + feature + 1) // 2 + feature


def _supernodes(graph: PromptGraph, data: PromptReport, ids: Sequence[str]) -> list[list[str]]:
    """Label and members of each, labels distinct: the viewers tell supernodes apart by them."""
    chosen = [depth for depth, level in enumerate(data.levels) if len(level.supernodes) <= _MOST_SUPERNODES]
    if not chosen:
        return []
    members: dict[int, list[str]] = {}
    for row, kind in enumerate(graph.nodes.kind.tolist()):
        if kind in (FEATURE, HEAD):
            members.setdefault(data.nodes[row].supernodes[chosen[-1]], []).append(ids[row])
    named = [(data.levels[chosen[-1]].labels[group], inside) for group, inside in sorted(members.items())]
    repeats, seen = Counter(label for label, _ in named), Counter[str]()
    found = []
    for label, inside in named:
        seen[label] += 1
        found.append([f"{label} {seen[label]}" if repeats[label] > 1 else label, *inside])
    return found
