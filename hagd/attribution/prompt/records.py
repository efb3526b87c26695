"""The record of one prompt's graph.

Shape legend: T positions, n nodes, E edges. Edges run from source (row 0 of `edge_index`) to target (row 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class PromptNodes:
    """Typed nodes; (kind, layer, position, feature) is the identity.

    Attributes:
        kind: int64 `[n]`, `FEATURE`, `HEAD`, `ERROR`, `TOKEN` or `LOGIT` of `hagd.attribution.records`.
        layer: int64 `[n]`, model layer; −1 for tokens, the number of layers for logits.
        position: int64 `[n]`.
        feature: int64 `[n]`, dictionary index; number of a head; vocabulary index of tokens and logits (−1: difference
            of two logits); 0 for errors.
        value: float32 `[n]`, activation of a feature, probability of a logit's token; of a head `u · z`, what its
            output does to the explained logits to first order; 0 for the others.
        influence: float32 `[n]`, share of the logits that passes through (`hagd.attribution.prompt.influence`).
        cumulative: float32 `[n]`, share of the influence on all nodes, before pruning, that this one and the more
            influential ones have.
        bias: float32 `[n]`, what a feature, head or logit has with no edges; 0 for the others.
    """

    kind: np.ndarray
    layer: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    value: np.ndarray
    influence: np.ndarray
    cumulative: np.ndarray
    bias: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


BIAS = -1
"""Stands for kind, layer, position and feature where biases are one end of a term."""


@dataclass(frozen=True)
class ScoreAttribution:
    """One attention score before softmax, and its largest terms (`hagd.attribution.prompt.scores`).

    Attributes:
        layer, head, query, key: which; query and key are positions.
        score: its value.
        ends: int64 `[n, 2, 4]`, kind, layer, position and feature of a source of the query and of one of the key, or
            BIAS.
        terms: float32 `[n]`, what each pair adds to the score; largest size first.
        of_all: share of the terms' absolute sum that these hold.
    """

    layer: int
    head: int
    query: int
    key: int
    score: float
    ends: np.ndarray
    terms: np.ndarray
    of_all: float


@dataclass(frozen=True)
class PromptGraph:
    """What carries most of the influence on some logits of one prompt.

    Attributes:
        tokens: int64 `[T]`.
        nodes: features by layer, position and index, then heads, errors, tokens, logits.
        edge_index: int64 `[2, E]`, source and target.
        edge_attr: float32 `[E]`, effect on the target's pre-activation, on the logit, or on a head's `u · z`.
        edge_influence: float32 `[E]`, influence that the edge carries.
        n_active: active features, of which pruning left some.
        n_edges: edges that were computed.
        replacement: influence of tokens over that of tokens and errors, before pruning.
        completeness: share of the influence on all nodes that comes from features, heads and tokens, before pruning.
        sum_error: largest deviation of edges plus bias from a target's value, over the largest value; of
            heads over theirs.
        score: an attention score, where one was asked for.
    """

    tokens: Tensor
    nodes: PromptNodes
    edge_index: np.ndarray
    edge_attr: np.ndarray
    edge_influence: np.ndarray
    n_active: int
    n_edges: int
    replacement: float
    completeness: float
    sum_error: float
    score: ScoreAttribution | None = None
