"""The circuit as the JSON that the page's own scripts read (`assets/model.js`)."""

from __future__ import annotations

import json
import math
from typing import Any, Protocol

import numpy as np

from hagd.report.records import Edges, HierarchyLevel, LayerReconstruction, NodeView, SizedCircuit, TopPrompt
from hagd.report.wording import node_label


class Shown(Protocol):
    """What the circuit view needs of a report."""

    @property
    def nodes(self) -> tuple[NodeView, ...]: ...

    @property
    def edges(self) -> Edges: ...

    @property
    def slot_names(self) -> tuple[str, ...]: ...

    @property
    def metrics(self) -> dict[str, float]: ...

    @property
    def levels(self) -> tuple[HierarchyLevel, ...]: ...

    @property
    def circuits(self) -> tuple[SizedCircuit, ...]: ...

    @property
    def value_names(self) -> dict[str, str]: ...

    @property
    def reconstruction(self) -> tuple[LayerReconstruction, ...]: ...


def payload(data: Shown) -> dict[str, Any]:
    """Columns of plain values: nodes (one entry a node in every column), edges by node position, names.

    Prompts that several nodes share are stored once; nodes refer to them as
    `[prompt, position, activation]`. Values that are not finite become null.
    """
    rows = ["tokens", *(f"layer {layer}" for layer in _layers(data)), "logits"]
    row_of = {layer: row for row, layer in enumerate(_layers(data), start=1)}
    prompts: dict[tuple[str, ...], int] = {}

    def places(top: tuple[TopPrompt, ...]) -> list[list[Any]]:
        return [[prompts.setdefault(p.tokens, len(prompts)), p.position, _short(p.activation)] for p in top]

    shown = [places(node.prompts) for node in data.nodes]
    levels = [
        {
            "labels": list(level.labels),
            "promoted": [_pairs(each.promoted) for each in level.supernodes],
            "inputs": [_pairs(each.inputs) for each in level.supernodes],
            "prompts": [places(each.prompts) for each in level.supernodes],
        }
        for level in data.levels
    ]
    return {
        "rows": rows,
        "slots": list(data.slot_names),
        "values": data.value_names,
        "levels": levels,
        "prompts": [list(tokens) for tokens in prompts],
        "nodes": {
            "id": [node.id for node in data.nodes],
            "kind": [node.kind for node in data.nodes],
            "row": [_row(node, row_of, len(rows)) for node in data.nodes],
            "slot": [node.slot for node in data.nodes],
            "feature": [node.feature for node in data.nodes],
            "label": [node_label(node) for node in data.nodes],
            "score": [_short(node.score) or 0.0 for node in data.nodes],
            "mean": [_short(node.mean_activation) for node in data.nodes],
            "effect": [_short(node.ablation_effect) for node in data.nodes],
            "path": [list(node.supernodes) for node in data.nodes],
            "promoted": [_pairs(node.promoted) for node in data.nodes],
            "inputs": [_pairs(node.inputs) for node in data.nodes],
            "prompts": shown,
        },
        "edges": _edges(data),
        "circuits": _circuits(data),
        "reported": data.metrics.get("circuit.nodes"),
    }


def embed(content: dict[str, Any]) -> str:
    """JSON that may stand inside a `<script>` element: no `<` that could end it or open a comment."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _layers(data: Shown) -> list[int]:
    inner = {node.layer for node in data.nodes if node.kind not in ("token", "logit")}
    return sorted(inner | {record.layer for record in data.reconstruction})


def _row(node: NodeView, row_of: dict[int, int], n_rows: int) -> int:
    if node.kind == "token":
        return 0
    return n_rows - 1 if node.kind == "logit" else row_of[node.layer]


def _edges(data: Shown) -> dict[str, list[Any]]:
    ids = np.array([node.id for node in data.nodes], dtype=np.int64)
    order = np.argsort(ids)
    place = {
        end: order[np.searchsorted(ids, getattr(data.edges, end), sorter=order)].tolist()
        for end in ("source", "target")
    }
    weight, influence = data.edges.weight, data.edges.influence
    drawn = {} if influence is None else {"drawn": _rounded(np.sign(weight) * influence)}
    return {**place, "weight": _rounded(weight), **drawn}


def _circuits(data: Shown) -> list[dict[str, Any]]:
    """Circuits by position of their nodes."""
    place = {node.id: index for index, node in enumerate(data.nodes)}
    return [
        {
            "nodes": sorted(place[i] for i in circuit.nodes.tolist()),
            "preservation": _short(circuit.preservation),
            "faithfulness": _short(circuit.faithfulness),
        }
        for circuit in data.circuits
    ]


def _rounded(values: np.ndarray) -> list[float]:
    return [_short(value) or 0.0 for value in values.tolist()]


def _pairs(pairs: tuple[tuple[str, float], ...]) -> list[list[Any]]:
    return [[token, _short(value)] for token, value in pairs]


def _short(value: float | None) -> float | None:
    """Four significant digits are more than a page shows, and halve its size."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")
