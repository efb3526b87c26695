"""Records of the attribution stage.

Shape legend: n nodes, E edges, L decomposed layers, S slots, m dictionary size. Edges point from source (row 0
of `edge_index`) to target (row 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

FEATURE, ERROR, TOKEN, LOGIT = 0, 1, 2, 3
KIND_NAMES = ("feature", "error", "token", "logit")


@dataclass(frozen=True)
class Attribution:
    """Effect of every feature on the task metric, each `[L, S, m]`.

    Attributes:
        signed: mean over prompts.
        importance: what ranks the nodes, `|signed|`.
        live: bool, active on at least one discovery prompt.
    """

    signed: Tensor
    importance: Tensor
    live: Tensor


@dataclass(frozen=True)
class Nodes:
    """Typed nodes; (kind, layer, slot, feature) is the identity.

    Attributes:
        kind: int64 `[n]`, FEATURE, ERROR, TOKEN or LOGIT.
        layer: int64 `[n]`, model layer; −1 for tokens, the number of layers for logits.
        slot: int64 `[n]`.
        feature: int64 `[n]`, dictionary index; 0 for the other kinds.
        attribution: `[n]`, signed effect on the metric; 0 for kinds that are not ablated.
        importance: `[n]`.
        mean: `[n]`, mean activation over the discovery split.
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
        nodes: features first, by falling importance, then errors, tokens and the logit.
        edge_index: int64 `[2, E]`, source and target.
        edge_attr: float32 `[E]`, mean effect on the target's pre-activation (or the metric, for the logit).
        flat: int64 `[n_features]`, position of each feature node in the flattened `[L, S, m]` gates.
        attribution: effects of all features, also of those that are no candidates.
    """

    nodes: Nodes
    edge_index: np.ndarray
    edge_attr: np.ndarray
    flat: np.ndarray
    attribution: Attribution

    @property
    def n_features(self) -> int:
        """Feature nodes, the first of the nodes."""
        return len(self.flat)
