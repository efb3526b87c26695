"""Scores of a graph's candidates by a trained scorer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.records import AttributionGraph
from hagd.errors import ArtifactError
from hagd.hierarchy.records import Hierarchy
from hagd.search.scorer.inputs import INPUTS, scored_graph
from hagd.search.scorer.records import ScoredGraph, TrainedScorer

if TYPE_CHECKING:
    from hagd.search.scorer.network import CircuitScorer


def score(trained: TrainedScorer, graph: AttributionGraph, hierarchy: Hierarchy, n_layers: int) -> np.ndarray:
    """Logits of circuit membership, float32 `[n_candidates]`; larger belongs more likely to the circuit.

    Args:
        trained: as from `train_scorer`.
        graph: its candidates are scored.
        hierarchy: of the same graph.
        n_layers: layers of the language model.

    Raises:
        ArtifactError: the scorer expects other inputs, its weights do not fit its configuration, or they yield a
            score that is not finite.
    """
    network = load_network(trained)
    scores = logits(network, scored_graph(graph, hierarchy, None, "scored", n_layers)).numpy()
    if not np.isfinite(scores).all():
        raise _unfit("finite scores", f"{int((~np.isfinite(scores)).sum())} of {len(scores)} that are NaN or infinite")
    return scores


def load_network(trained: TrainedScorer) -> CircuitScorer:
    """The network with the weights of `trained`.

    Raises:
        ArtifactError: other inputs, or weights that do not fit the configuration.
    """
    if trained.inputs != INPUTS:
        raise _unfit(f"the inputs {', '.join(INPUTS)}", ", ".join(trained.inputs))
    try:
        network = build_network(trained.config)
        network.load_state_dict(trained.state)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise _unfit(f"weights of a network with {trained.config}", str(error)) from error
    return network.eval()


def build_network(config: dict[str, Any]) -> CircuitScorer:
    """An untrained network; torch_geometric, which takes seconds to import, is only imported here."""
    from hagd.search.scorer.network import CircuitScorer

    return CircuitScorer(**config)


def logits(network: CircuitScorer, graph: ScoredGraph) -> Tensor:
    """Logits `[n_candidates]` without gradients."""
    with torch.no_grad():
        result: Tensor = network(graph.inputs, graph.edge_index, graph.edge_type, graph.edge_attr, graph.n_candidates)
    return result


def _unfit(expected: str, found: str) -> ArtifactError:
    return ArtifactError(
        f"search.scorer: expected {expected}, found {found}; train the scorer again (train.py stage=gnn) "
        "or set search.scorer=null"
    )
