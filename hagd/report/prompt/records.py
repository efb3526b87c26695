"""Record of the report on one prompt's graph, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from hagd.report.records import Edges, HierarchyLevel, LayerReconstruction, NodeView, SizedCircuit


@dataclass(frozen=True)
class Prediction:
    """A next token: its text, its probability, and whether it is a node of the graph."""

    text: str
    probability: float
    explained: bool


@dataclass(frozen=True)
class ScoreTerm:
    """One term of an attention score: names of what the query and the key read, and what they add together."""

    query: str
    key: str
    value: float


@dataclass(frozen=True)
class ScoreView:
    """An attention score before softmax, and its largest terms.

    Attributes:
        name: which head attends from where to where.
        score: its value.
        of_all: share of the terms' absolute sum that are listed.
        terms: largest first.
    """

    name: str
    score: float
    of_all: float
    terms: tuple[ScoreTerm, ...]


@dataclass(frozen=True)
class PromptReport:
    """The graph of one prompt.

    Attributes:
        model: name as in the configuration. prompt: its text.
        settings: resolved configuration, flat.
        metrics: flat.
        tokens: texts of the prompt's tokens.
        slot_names: one a position, `3 is` for the token ` is` there.
        predictions: the most likely next tokens, and those explained.
        reconstruction: one record a decomposed layer.
        nodes: `slot` is the position and `score` the influence. edges: between them.
        score: an attention score, where one was asked for.
        levels: coarse to fine.
        circuits: none.
        warnings: what the reader must know before believing a number.
    """

    model: str
    prompt: str
    settings: dict[str, str]
    metrics: dict[str, float]
    tokens: tuple[str, ...]
    slot_names: tuple[str, ...]
    predictions: tuple[Prediction, ...]
    reconstruction: tuple[LayerReconstruction, ...]
    nodes: tuple[NodeView, ...]
    edges: Edges
    score: ScoreView | None = None
    levels: tuple[HierarchyLevel, ...] = ()
    circuits: tuple[SizedCircuit, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def value_names(self) -> dict[str, str]:
        """What `NodeView.mean_activation` is, by kind of node; not shown of other kinds."""
        return {"feature": "Activation", "head": "Adds to the logits, first order", "logit": "Probability"}
