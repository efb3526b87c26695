"""Records of the attribution stage.

Shape legend: n nodes, E edges, L decomposed layers, S slots, m dictionary size. Edges point from source (row 0
of `edge_index`) to target (row 1). Gates are those of `hagd.patching.records.GateLayout`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

FEATURE, ERROR, TOKEN, LOGIT, HEAD = 0, 1, 2, 3, 4
KIND_NAMES = ("feature", "error", "token", "logit", "head")


@dataclass(frozen=True)
class Attribution:
    """Effect of every feature, and of every head that is a node, on the task metric, each in the shape of the gates.

    Attributes:
        signed: mean over prompts.
        importance: what ranks the nodes, `|signed|`.
        live: bool, active on at least one discovery prompt; heads always are.
    """

    signed: Tensor
    importance: Tensor
    live: Tensor


@dataclass(frozen=True)
class Nodes:
    """Typed nodes; (kind, layer, slot, feature) is the identity.

    Attributes:
        kind: int64 `[n]`, FEATURE, ERROR, TOKEN, LOGIT or HEAD.
        layer: int64 `[n]`, model layer; −1 for tokens, the number of layers for logits.
        slot: int64 `[n]`.
        feature: int64 `[n]`, dictionary index of a feature, number of a head; 0 for the other kinds.
        attribution: `[n]`, signed effect on the metric; 0 for kinds that are not ablated.
        importance: `[n]`.
        mean: `[n]`, mean activation over the discovery split; of a head, the length of its mean output.
        frequency: `[n]`, share of prompts on which the node is active.
    """

    kind: np.ndarray
    layer: np.ndarray
    slot: np.ndarray
    feature: np.ndarray
    attribution: np.ndarray
    importance: np.ndarray
    mean: np.ndarray
    frequency: np.ndarray

    def __len__(self) -> int:
        return len(self.kind)


@dataclass(frozen=True)
class AttributionGraph:
    """Nodes and the sparse edges between them.

    Attributes:
        nodes: candidates (features, and heads where they are nodes) first, by falling importance, then errors, tokens
            and the logit.
        edge_index: int64 `[2, E]`, source and target.
        edge_attr: float32 `[E]`, mean effect on the target's pre-activation (on the metric, for the logit; on what the
            head's output does to the metric to first order, for a head).
        flat: int64 `[n_candidates]`, position of each candidate in the flattened gates.
        attribution: effects of all features and heads, also of those that are no candidates.
    """

    nodes: Nodes
    edge_index: np.ndarray
    edge_attr: np.ndarray
    flat: np.ndarray
    attribution: Attribution

    @property
    def n_candidates(self) -> int:
        """Nodes that a circuit may have, the first of the nodes."""
        return len(self.flat)
