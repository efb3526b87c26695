"""What the supernodes of one prompt's graph write together.

Shape legend: n nodes of the graph, d = d_model, T positions, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy.sparse import csr_array
from torch import Tensor

from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import FEATURE, HEAD
from hagd.hierarchy.records import Hierarchy, Level
from hagd.models.language_model import LanguageModel
from hagd.report.assemble import written
from hagd.report.records import HierarchyLevel, SupernodeView
from hagd.report.supernodes import named, place, promoted_together
from hagd.transcoders.records import TranscoderSet


def levels(
    lm: LanguageModel,
    transcoders: TranscoderSet,
    graph: PromptGraph,
    hierarchy: Hierarchy,
    by_heads: Mapping[int, Tensor],
    slot_names: Sequence[str],
    text: Callable[[int], str],
) -> tuple[HierarchyLevel, ...]:
    """Every level of `hierarchy`, its supernodes named and described; `by_heads` is layer → `[T, H, d]`."""
    outputs = _written(lm, transcoders, graph, by_heads)
    return tuple(_level(lm, graph, level, outputs, slot_names, text) for level in hierarchy.levels)


def _level(
    lm: LanguageModel,
    graph: PromptGraph,
    level: Level,
    outputs: np.ndarray,
    slot_names: Sequence[str],
    text: Callable[[int], str],
) -> HierarchyLevel:
    nodes, n = graph.nodes, len(graph.nodes)
    members = csr_array((np.ones(n), (level.supernode, np.arange(n))), shape=(level.n_supernodes, n))
    promoted = promoted_together(members @ outputs, lm.unembedding, text)
    views = []
    for i, together in enumerate(promoted):
        rows = np.flatnonzero(level.supernode == i)
        slot, span = place(nodes.layer[rows], nodes.position[rows], slot_names, lm.n_layers)
        writes = together if outputs[rows].any() else ()
        label = named(slot, span, (), writes, len(rows), int((nodes.kind[rows] == HEAD).sum()))
        views.append(SupernodeView(label, len(rows), slot, span, promoted=writes))
    return HierarchyLevel(tuple(views), level.modularity, level.eigengap, level.conductance)


def _written(
    lm: LanguageModel, transcoders: TranscoderSet, graph: PromptGraph, by_heads: Mapping[int, Tensor]
) -> np.ndarray:
    """What each feature and head adds to the residual stream, `[n, d]`; nothing for other nodes."""
    nodes = graph.nodes
    found = np.zeros((len(nodes), lm.d_model), dtype=np.float32)
    for row in np.flatnonzero(np.isin(nodes.kind, (FEATURE, HEAD))).tolist():
        layer, feature = int(nodes.layer[row]), int(nodes.feature[row])
        if nodes.kind[row] == FEATURE:
            direction = written(transcoders, transcoders.layers.index(layer), feature).detach().float().cpu()
            found[row] = direction.numpy() * nodes.value[row]
        else:
            found[row] = by_heads[layer][int(nodes.position[row]), feature].float().cpu().numpy()
    return found
