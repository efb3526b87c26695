"""Record of the report stage: everything that figures, terminal and page show, as plain values.

The figures, the terminal tables and the page read nothing else, so a stored report can be drawn again
without the model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

import numpy as np

from hagd.errors import ArtifactError

NodeKind = Literal["feature", "head", "error", "token", "logit"]

REQUIRED_METRICS = (
    "model.accuracy",
    "model.chance",
    "empty.accuracy",
    "circuit.nodes",
    "circuit.edges",
    "validation.preservation",
    "validation.n_prompts",
)
"""Keys without which no headline can be written; every other metric is shown when present."""


@dataclass(frozen=True)
class SearchPart:
    """One part of the search: what it changed and what it cost.

    Attributes:
        name: as in `hagd.search.records.SearchStep`.
        evaluations: model evaluations spent.
        seconds: wall-clock time.
        changed_nodes: nodes that entered the circuit of the reported size.
        preservation_before, preservation_after: on the selection split; None or NaN where not measured.
        note: one line for the reader, empty if there is nothing to say.
    """

    name: str
    evaluations: int
    seconds: float
    changed_nodes: int
    preservation_before: float | None = None
    preservation_after: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Curve:
    """One method at several circuit sizes, on the validation split.

    Attributes:
        method: shown beside the line (`HAGD circuit`, of other searches `this circuit`; `random nodes`).
        sizes: nodes kept, ascending.
        faithfulness, preservation: `F` and `φ` at each size.
        low, high: 95 % interval of `preservation`; empty when there is none.
        control: whether the method is a control; the others are drawn bold.
    """

    method: str
    sizes: tuple[int, ...]
    faithfulness: tuple[float, ...]
    preservation: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    control: bool = True


@dataclass(frozen=True)
class LayerReconstruction:
    """How well one layer's transcoder explains what the layer computes.

    Attributes:
        layer: index in the model.
        fvu: unexplained share of variance over all slots.
        l0: mean number of active features a token.
        dead: share of features that never fire.
        slot_fvu: `fvu` per slot, in the order of `ReportData.slot_names`; NaN where not measured.
    """

    layer: int
    fvu: float
    l0: float
    dead: float
    slot_fvu: tuple[float, ...] = ()


@dataclass(frozen=True)
class TopPrompt:
    """A prompt on which a node is strongly active: token texts, the position, the activation there."""

    tokens: tuple[str, ...]
    position: int
    activation: float


@dataclass(frozen=True)
class NodeView:
    """One node of the circuit, with what a reader needs to name it.

    Attributes:
        id: distinct among the nodes of the report; edges refer to it.
        kind: decides the row for `token` (bottom) and `logit` (top).
        layer: of the model; not read for tokens and logits.
        slot: index into `ReportData.slot_names`.
        feature: dictionary index, number of a head, vocabulary index for tokens and logits, 0 for errors.
        score: importance by which the circuit was ranked; larger is kept longer.
        mean_activation: over the discovery split.
        ablation_effect: rise of KL(model ‖ circuit) when this node alone is ablated; None where not measured.
        label: short name; empty to name the node by what it promotes.
        prompts: strongest first.
        promoted: (token, logit) pairs, strongest first.
        inputs: (token, mean activation) pairs, strongest first.
        supernodes: index of its supernode at each hierarchy level, coarse to fine; empty outside the hierarchy.
    """

    id: int
    kind: NodeKind
    layer: int
    slot: int
    feature: int
    score: float
    mean_activation: float
    ablation_effect: float | None = None
    label: str = ""
    prompts: tuple[TopPrompt, ...] = ()
    promoted: tuple[tuple[str, float], ...] = ()
    inputs: tuple[tuple[str, float], ...] = ()
    supernodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Edges:
    """Circuit edges: `source`, `target` int64 `[E]` (node ids) and `weight` float `[E]`.

    `influence` float `[E]`, never negative, is how strong an edge is drawn where weights into different kinds of nodes
    are in different units; None: its weight.
    """

    source: np.ndarray
    target: np.ndarray
    weight: np.ndarray
    influence: np.ndarray | None = None


@dataclass(frozen=True)
class SupernodeView:
    """One supernode, described by all of its members, in the circuit or not.

    Attributes:
        label: short name.
        n_nodes: members.
        slot: where most of them are.
        layers: range of layers.
        inputs: (token, mean share of a member's largest activation) pairs, strongest first.
        promoted: (token, logit) pairs, strongest first, of what the members write together on average.
        prompts: on which members are most active together, strongest first; `activation` is a share as in `inputs`.
    """

    label: str
    n_nodes: int
    slot: str
    layers: str
    inputs: tuple[tuple[str, float], ...] = ()
    promoted: tuple[tuple[str, float], ...] = ()
    prompts: tuple[TopPrompt, ...] = ()


@dataclass(frozen=True)
class HierarchyLevel:
    """One level of the partition, coarse to fine.

    Attributes:
        supernodes: by number.
        modularity, eigengap, conductance, coherence, coherence_null: as in `hagd.hierarchy.records.Level`.
    """

    supernodes: tuple[SupernodeView, ...]
    modularity: float
    eigengap: float
    conductance: float
    coherence: float = math.nan
    coherence_null: float = math.nan

    @property
    def labels(self) -> tuple[str, ...]:
        """Name of each supernode."""
        return tuple(supernode.label for supernode in self.supernodes)


@dataclass(frozen=True)
class SizedCircuit:
    """A circuit that the search found at one size.

    Attributes:
        nodes: ids of its features and heads, int64 `[n]`.
        preservation, faithfulness: φ and F on the validation split; NaN where not measured.
    """

    nodes: np.ndarray
    preservation: float = math.nan
    faithfulness: float = math.nan


@dataclass(frozen=True)
class ReportData:
    """The results of one extraction.

    Attributes:
        model, task: names as in the configuration.
        seed: of the run.
        settings: resolved configuration, flat (`search.n_nodes` → `200`).
        metrics: flat; `<key>.low` and `<key>.high` bound a 95 % interval.
        slot_names: position roles, in column order.
        search: parts of the search that ran, in order.
        curves: the extracted circuit's method first.
        reconstruction: one record a decomposed layer.
        nodes, edges: of all `circuits`, with the tokens, errors and logits that edges join to them.
        levels: coarse to fine.
        circuits: ascending by size, the reported one among them; without any, `nodes` are the reported circuit.
        warnings: what the reader must know before believing a number.

    Raises:
        ArtifactError: parts that do not fit together; all of them in one message.
    """

    model: str
    task: str
    seed: int
    settings: dict[str, str]
    metrics: dict[str, float]
    slot_names: tuple[str, ...]
    search: tuple[SearchPart, ...]
    curves: tuple[Curve, ...]
    reconstruction: tuple[LayerReconstruction, ...]
    nodes: tuple[NodeView, ...]
    edges: Edges
    levels: tuple[HierarchyLevel, ...]
    circuits: tuple[SizedCircuit, ...] = ()
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [
            *(f"metrics lack {key!r}; measure it in validation" for key in REQUIRED_METRICS if key not in self.metrics),
            *chain.from_iterable(_curve_problems(curve) for curve in self.curves),
            *self._node_problems(),
            *self._edge_problems(),
            *self._circuit_problems(),
        ]
        if problems:
            raise ArtifactError("ReportData does not fit together: " + "; ".join(problems))

    @property
    def value_names(self) -> dict[str, str]:
        """What `NodeView.mean_activation` is, by kind of node; not shown of other kinds."""
        return {"feature": "Mean activation", "head": "Length of its mean output"}

    def interval(self, key: str) -> tuple[float, float] | None:
        """The 95 % interval of a metric, None where there is none or it is undefined."""
        low, high = self.metrics.get(f"{key}.low", math.nan), self.metrics.get(f"{key}.high", math.nan)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None

    def reported(self) -> ReportData:
        """This record with the nodes and edges of the reported circuit alone."""
        if not self.circuits:
            return self
        size = int(self.metrics["circuit.nodes"])
        members = next(circuit.nodes for circuit in self.circuits if len(circuit.nodes) == size)
        ids = np.array([node.id for node in self.nodes], dtype=np.int64)
        is_end = np.array([node.kind not in ("feature", "head") for node in self.nodes], dtype=bool)
        kept = joined(self.edges, ids[is_end | np.isin(ids, members)])
        touched = np.concatenate([kept.source, kept.target, members])
        shown = np.isin(ids, touched)
        return replace(
            self,
            nodes=tuple(node for node, stays in zip(self.nodes, shown, strict=True) if stays),
            edges=kept,
            circuits=(),
        )

    def coarsest(self) -> int | None:
        """The coarsest level that divides the circuit, whose supernodes give the colours; None without one."""
        return next((depth for depth, level in enumerate(self.levels) if len(level.labels) > 1), None)

    def _node_problems(self) -> list[str]:
        problems = []
        if len({node.id for node in self.nodes}) != len(self.nodes):
            problems.append("node ids must be distinct, found repeated ones")
        slots = range(len(self.slot_names))
        stray = sorted({node.slot for node in self.nodes if node.slot not in slots})
        if stray:
            problems.append(f"node slots must index the {len(slots)} slot_names, found {stray[:5]}")
        widths = tuple(len(level.labels) for level in self.levels)
        lost = [node.id for node in self.nodes if node.supernodes and not _path_fits(node.supernodes, widths)]
        if lost:
            problems.append(f"node.supernodes must index levels of sizes {widths}, found others in nodes {lost[:5]}")
        return problems

    def _circuit_problems(self) -> list[str]:
        if not self.circuits:
            return []
        ids, sizes = [node.id for node in self.nodes], [len(circuit.nodes) for circuit in self.circuits]
        stray = [i for i, circuit in enumerate(self.circuits) if not np.isin(circuit.nodes, ids).all()]
        problems = [f"circuits must hold nodes of the report, found others in circuits {stray}"] if stray else []
        if sizes != sorted(set(sizes)) or self.metrics.get("circuit.nodes") not in sizes:
            problems.append(
                f"circuits must ascend by size and hold that of circuit.nodes ({self.metrics.get('circuit.nodes')}), "
                f"found sizes {sizes}"
            )
        return problems

    def _edge_problems(self) -> list[str]:
        edges, ids = self.edges, np.array([node.id for node in self.nodes], dtype=np.int64)
        shapes = (edges.source.shape, edges.target.shape, edges.weight.shape)
        if len(set(shapes)) != 1 or edges.source.ndim != 1:
            return [f"edges.source, target and weight must be vectors of one length, found shapes {shapes}"]
        stray = np.setdiff1d(np.concatenate([edges.source, edges.target]), ids)
        return [f"edges must join nodes of the report, found ids {stray[:5].tolist()}"] if stray.size else []


def joined(edges: Edges, ids: np.ndarray) -> Edges:
    """The edges with both ends among `ids`."""
    kept = np.isin(edges.source, ids) & np.isin(edges.target, ids)
    influence = None if edges.influence is None else edges.influence[kept]
    return Edges(edges.source[kept], edges.target[kept], edges.weight[kept], influence)


def _path_fits(path: tuple[int, ...], widths: tuple[int, ...]) -> bool:
    return len(path) == len(widths) and all(0 <= index < width for index, width in zip(path, widths, strict=True))


def _curve_problems(curve: Curve) -> list[str]:
    lengths = {len(curve.sizes), len(curve.faithfulness), len(curve.preservation)}
    lengths |= {len(bound) for bound in (curve.low, curve.high) if bound}
    if len(lengths) == 1 and bool(curve.low) == bool(curve.high):
        return []
    return [f"curve {curve.method!r} must have one value a size ({len(curve.sizes)}), found lengths {sorted(lengths)}"]
