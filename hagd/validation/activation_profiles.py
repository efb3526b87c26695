"""What the candidate nodes of a graph respond to: their activations on prompts, by kind and slot.

Shape legend: n nodes, R places (prompt and position) of a slot, L layers, m dictionary size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from hagd.attribution.records import HEAD, AttributionGraph
from hagd.patching.patched_model import PatchedModel
from hagd.search.records import Circuit
from hagd.tasks.records import Prompts

Group = tuple[bool, int]
"""Head or feature, and slot."""

_AT_ONCE = 64


@dataclass(frozen=True)
class Side:
    """One of two extractions: model, graph, circuit."""

    patched: PatchedModel
    graph: AttributionGraph
    circuit: Circuit

    def rows(self, circuit: Circuit) -> np.ndarray:
        """Rows of a circuit's nodes among the candidates of the graph."""
        return np.flatnonzero(np.isin(self.graph.flat, circuit.nodes))


class Profiles:
    """Activations of all candidates of one graph at every place of their slot.

    Attributes:
        groups: group → its candidates, ascending.
        varies: bool `[n_candidates]`, whether the activation is not the same everywhere.
    """

    def __init__(self, side: Side, prompts: Sequence[Prompts]) -> None:
        nodes, n = side.graph.nodes, side.graph.n_candidates
        head = nodes.kind[:n] == HEAD
        self.groups: dict[Group, np.ndarray] = {
            (kind, slot): np.flatnonzero((head == kind) & (nodes.slot[:n] == slot))
            for kind, slot in sorted(set(zip(head.tolist(), nodes.slot[:n].tolist(), strict=True)))
        }
        parts = [_activations(side, part, self.groups) for part in _parts(prompts)]
        starts = np.cumsum([0, *(len(part) for part in _parts(prompts))])
        self._values = {group: np.concatenate([values[group][0] for values in parts]) for group in self.groups}
        self._prompt = {
            group: np.concatenate([values[group][1] + start for values, start in zip(parts, starts, strict=False)])
            for group in self.groups
        }
        self.varies = np.zeros(n, dtype=bool)
        for group, rows in self.groups.items():
            self.varies[rows] = np.ptp(self._values[group], axis=0) > 0

    def columns(self, group: Group, rows: np.ndarray) -> np.ndarray:
        """Columns of those of the candidates `rows` that are in the group, ascending."""
        return np.sort(np.searchsorted(self.groups[group], rows[np.isin(rows, self.groups[group])]))

    def of(
        self, group: Group, columns: np.ndarray | slice = slice(None), prompts: np.ndarray | None = None
    ) -> np.ndarray:
        """`[R, n]` of candidates of the group, by column mean 0 and length 1 (0 where constant).

        Args:
            group: kind and slot.
            columns: of the candidates.
            prompts: numbers of prompts, repetitions allowed; None = all.
        """
        values = self._values[group][:, columns]
        if prompts is None:
            return standardised(values)
        first, last = (np.searchsorted(self._prompt[group], prompts, side) for side in ("left", "right"))
        return standardised(values[np.concatenate([np.arange(a, b) for a, b in zip(first, last, strict=True)])])


def _parts(prompts: Sequence[Prompts]) -> list[Prompts]:
    return [split[i : i + _AT_ONCE] for split in prompts for i in range(0, len(split), _AT_ONCE)]


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and length 1, whose products are correlations; 0 where constant."""
    constant = np.ptp(values, axis=0) == 0
    centred = np.where(constant, 0.0, values - values.mean(0))
    return centred / np.where(constant, 1.0, np.linalg.norm(centred, axis=0))


@torch.no_grad()
def _activations(
    side: Side, prompts: Prompts, groups: Mapping[Group, np.ndarray]
) -> dict[Group, tuple[np.ndarray, np.ndarray]]:
    """Activations `[R, n]` of the candidates of each group (of heads: lengths of outputs), and the prompts of rows."""
    patched, nodes = side.patched, side.graph.nodes
    tokens, slots = (each.flatten(0, 1).to(patched.lm.device) for each in (prompts.tokens, prompts.slots))
    computed = {False: patched.features(tokens)[0].cpu()}
    layers = {False: patched.layout.layers, True: patched.layout.head_layers}
    if patched.layout.head_layers:
        computed[True] = patched.heads(tokens).norm(dim=-1).cpu()
    found = {}
    for (head, slot), rows in groups.items():
        row, position = (slots == slot).cpu().nonzero(as_tuple=True)
        layer = torch.tensor([layers[head].index(each) for each in nodes.layer[rows].tolist()])
        at_LRm = computed[head][:, row, position]
        values = at_LRm[layer, :, torch.as_tensor(nodes.feature[rows])].T
        found[head, slot] = values.double().numpy(), (row // prompts.tokens.shape[1]).numpy()
    return found
