"""One prompt's graph with a node of every kind, and its report."""

from __future__ import annotations

import numpy as np
import torch

from hagd.attribution.prompt.records import PromptGraph, PromptNodes
from hagd.attribution.records import ERROR, FEATURE, HEAD, KIND_NAMES, LOGIT, TOKEN
from hagd.report.prompt.records import PromptReport
from hagd.report.records import Edges, HierarchyLevel, NodeView, SupernodeView

ROWS = (  # kind, layer, position, feature, value; circuit-tracer calls the first and the error both 0_1_2
    (FEATURE, 0, 2, 1, 1.5),
    (FEATURE, 1, 0, 7, 0.5),
    (FEATURE, 1, 2, 7, 0.25),
    (HEAD, 1, 2, 1, -0.1),
    (ERROR, 1, 2, 0, 0.0),
    (TOKEN, -1, 0, 11, 0.0),
    (TOKEN, -1, 2, 13, 0.0),
    (LOGIT, 2, 2, 5, 0.75),
    (LOGIT, 2, 2, 6, 0.125),
)
LABELS = ("", "", "", "L1.1", "error L1 c", " a", "c", 'logit x"y', "logit  z")


def made_graph() -> PromptGraph:
    """Nodes as in `ROWS`."""
    kind, layer, position, feature, value = (np.array(column) for column in zip(*ROWS, strict=True))
    influence = np.array([0.3, 0.2, 0.2, 0.1, 0.05, 0.05, 0.1, 0, 0], dtype=np.float32)
    cumulative = np.array([0.3, 0.5, 0.7, 0.8, 0.95, 1.0, 0.9, 1.0, 1.0], dtype=np.float32)
    integers = (x.astype(np.int64) for x in (kind, layer, position, feature))
    nodes = PromptNodes(*integers, value.astype(np.float32), influence, cumulative, np.zeros(9, np.float32))
    edges = np.array([[5, 6, 0, 0, 1, 2, 3, 4, 2], [1, 0, 2, 7, 7, 7, 7, 7, 8]])
    weight = np.linspace(-1, 1, 9, dtype=np.float32)
    return PromptGraph(torch.tensor([11, 12, 13]), nodes, edges, weight, np.abs(weight), 9, 20, 0.9, 0.8, 0.0)


def made_report(graph: PromptGraph) -> PromptReport:
    """Its report, with two levels; the supernodes of the second have the same label."""
    groups = (0, 0, 1, 1, 1, 0, 1, 1, 1)
    views = tuple(
        NodeView(
            row,
            KIND_NAMES[kind],  # type: ignore[arg-type]
            layer,
            position,
            feature,
            0.1,
            value,
            label=LABELS[row],
            promoted=(("x", 1.0),) if kind == FEATURE else (),
            supernodes=(0, groups[row]),
        )
        for row, (kind, layer, position, feature, value) in enumerate(ROWS)
    )
    levels = tuple(
        HierarchyLevel(tuple(SupernodeView(label, 1, "a", "L0") for label in labels), 0.0, 0.0, 0.0)
        for labels in (("all",), ("same", "same"))
    )
    return PromptReport(
        model="gpt2_mini",
        prompt="a b, c!",
        settings={},
        metrics={},
        tokens=("a", " b", "c"),
        slot_names=("0 a", "1  b", "2 c"),
        predictions=(),
        reconstruction=(),
        nodes=views,
        edges=Edges(*graph.edge_index, graph.edge_attr, graph.edge_influence),
        levels=levels,
    )
