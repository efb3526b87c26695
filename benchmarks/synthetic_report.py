"""Synthetic extraction results of any size, shaped like those of a real run."""

from __future__ import annotations

import numpy as np

from hagd.report.records import (
    Curve,
    Edges,
    HierarchyLevel,
    LayerReconstruction,
    NodeView,
    ReportData,
    SearchPart,
    SizedCircuit,
    SupernodeView,
    TopPrompt,
)

SLOTS = ("a", "b", "=")
TROUBLESOME = ("</script>", " Paris", "$x^2$", "\n", "日本", "<b>", "ab\tc")
"""Token texts that break careless HTML, mathtext or fonts."""


def _curves(rng: np.random.Generator) -> tuple[Curve, ...]:
    sizes = (10, 20, 50, 100, 200, 500, 1000, 2000)
    steepness = {
        "HAGD circuit": 55.0,
        "integrated gradients": 110.0,
        "gradient × activation": 190.0,
        "random nodes": 2600.0,
    }
    curves = []
    for method, half in steepness.items():
        value = 0.08 + 0.91 * (1 - np.exp(-np.array(sizes) / half)) + rng.normal(0, 0.005, len(sizes))
        spread = 0.02 + 0.04 * value * (1 - value)
        curves.append(
            Curve(
                method=method,
                sizes=sizes,
                faithfulness=tuple(((value - 0.08) / 0.92).tolist()),
                preservation=tuple(value.tolist()),
                low=tuple((value - spread).tolist()),
                high=tuple(np.minimum(1, value + spread).tolist()),
                control=method != "HAGD circuit",
            )
        )
    return tuple(curves)


def _details(rng: np.random.Generator) -> dict:
    words = [str(number) for number in range(59)]
    prompts = []
    for activation in sorted(rng.gamma(2, 1, 5), reverse=True):
        tokens = (words[rng.integers(59)], words[rng.integers(59)], "=")
        prompts.append(TopPrompt(tokens, int(rng.integers(3)), float(activation)))
    promoted = tuple((words[rng.integers(59)], float(logit)) for logit in sorted(rng.gamma(2, 1, 6), reverse=True))
    return {
        "prompts": tuple(prompts),
        "promoted": promoted,
        "inputs": tuple((token, value / 2) for token, value in promoted),
    }


def _nodes(rng: np.random.Generator, n_nodes: int, n_layers: int, widths: tuple[int, ...]) -> tuple[NodeView, ...]:
    ends = [("token", 0, TROUBLESOME[0]), ("token", 1, TROUBLESOME[1]), ("logit", 2, TROUBLESOME[2])]
    nodes = [
        NodeView(index, kind, -1, slot, index, 1.0, 1.0, None, label=label)  # type: ignore[arg-type]
        for index, (kind, slot, label) in enumerate(ends)
    ]
    for index in range(len(nodes), n_nodes):
        leaf = int(rng.integers(widths[-1]))
        nodes.append(
            NodeView(
                id=index,
                kind="error" if rng.random() < 0.03 else "feature",
                layer=int(rng.integers(n_layers)),
                slot=int(rng.choice(len(SLOTS), p=[0.2, 0.25, 0.55])),
                feature=int(rng.integers(4096)),
                score=float(rng.gamma(0.7, 1)),
                mean_activation=float(rng.gamma(2, 0.5)),
                ablation_effect=float(rng.normal(0.05, 0.03)) if rng.random() < 0.8 else None,
                supernodes=tuple(leaf * width // widths[-1] for width in widths),
                **_details(rng),
            )
        )
    return tuple(nodes)


def _supernode(rng: np.random.Generator, index: int) -> SupernodeView:
    label = f"{'ABCDEFGH'[index % 8]}{index}: sums near {index * 7 % 59}"
    return SupernodeView(label, 1 + index, SLOTS[index % len(SLOTS)], "L0–1", **_details(rng))


def _edges(rng: np.random.Generator, nodes: tuple[NodeView, ...], n_edges: int, n_layers: int) -> Edges:
    height = np.array([{"token": -1, "logit": n_layers}.get(node.kind, node.layer) for node in nodes])
    slot = np.array([node.slot for node in nodes])
    source, target = rng.integers(len(nodes), size=(2, 12 * n_edges))
    ahead = np.flatnonzero((height[source] < height[target]) & (slot[source] <= slot[target]))[:n_edges]
    weight = rng.normal(0, 1, ahead.size) * rng.gamma(0.3, 1, ahead.size)
    return Edges(source[ahead].astype(np.int64), target[ahead].astype(np.int64), weight.astype(np.float32))


def _circuits(nodes: tuple[NodeView, ...]) -> tuple[SizedCircuit, ...]:
    """The best 10, 20, 50, … features, and all."""
    best = sorted((node for node in nodes if node.kind == "feature"), key=lambda node: -node.score)
    sizes = [size for size in (10, 20, 50, 100, 200, 500, 1000, 2000) if size < len(best)]
    return tuple(
        SizedCircuit(np.array([node.id for node in best[:size]]), 1 - 5 / (5 + size), 1 - 9 / (9 + size))
        for size in (*sizes, len(best))
    )


METRICS = {
    "model.accuracy": 1.0,
    "model.chance": 1 / 59,
    "empty.accuracy": 0.08,
    "transcoder.fvu": 0.0052,
    "transcoder.l0": 31.6,
    "transcoder.dead": 0.12,
    "transcoder.spliced_accuracy": 0.998,
    "graph.nodes": 3155,
    "graph.edges": 98_412,
    "hierarchy.levels": 3,
    "hierarchy.modularity": 0.31,
    "validation.preservation": 0.948,
    "validation.preservation.low": 0.927,
    "validation.preservation.high": 0.969,
    "validation.preservation_lenient": 0.961,
    "validation.sufficiency": 0.93,
    "validation.necessity": 0.88,
    "validation.preservation_resample": 0.902,
    "validation.n_prompts": 512,
    "control.random.preservation": 0.102,
    "control.random.preservation.low": 0.09,
    "control.random.preservation.high": 0.115,
    "control.attribution.preservation": 0.894,
    "control.attribution.preservation.low": 0.866,
    "control.attribution.preservation.high": 0.921,
    "curve.cpr_log": 0.79,
    "curve.cpr": 0.97,
    "curve.cmd": 0.02,
    "time.total_s": 143.2,
    "memory.peak_mb": 912.0,
}


def build_report(n_nodes: int = 200, n_edges: int = 2000, n_layers: int = 2, seed: int = 0) -> ReportData:
    """A report of the given size; node texts include those that break careless output."""
    rng = np.random.default_rng(seed)
    widths = (4, 16, min(64, max(16, n_nodes // 12)))
    nodes = _nodes(rng, n_nodes, n_layers, widths)
    edges = _edges(rng, nodes, n_edges, n_layers)
    counted = {
        "circuit.nodes": float(sum(node.kind in ("feature", "head") for node in nodes)),
        "circuit.edges": float(edges.weight.size),
    }
    return ReportData(
        model="gpt2_mini",
        task="modular_addition",
        seed=seed,
        settings={"search.n_nodes": str(n_nodes), "transcoder.k": "16", "graph.ablation": "mean"},
        metrics=METRICS | counted,
        slot_names=SLOTS,
        search=(
            SearchPart("scorer", 0, 0.4, n_nodes, None, 0.894, "meta-learned on 6 circuits"),
            SearchPart("traversal", 180, 12.3, 41, 0.894, 0.901),
            SearchPart("gates", 400, 31.7, 63, 0.901, 0.951),
            SearchPart("pruning", 100, 7.9, 4, 0.951, 0.953),
        ),
        curves=_curves(rng),
        reconstruction=tuple(
            LayerReconstruction(
                layer,
                0.004 + 0.0012 * layer,
                31.0 + layer,
                0.1 + 0.02 * layer,
                tuple((0.004 + 0.0012 * layer) * np.array([0.6, 0.9, 1.7])),
            )
            for layer in range(n_layers)
        ),
        nodes=nodes,
        edges=edges,
        levels=tuple(
            HierarchyLevel(
                tuple(_supernode(rng, index) for index in range(width)),
                0.31 + 0.05 * depth,
                0.12 - 0.03 * depth,
                0.4 + 0.1 * depth,
            )
            for depth, width in enumerate(widths)
        ),
        circuits=_circuits(nodes),
        warnings=("transcoder of layer 1: 27 % of the variance is unexplained at slot '='",),
    )
