"""ACDC (Conmy et al. 2023): greedy pruning of the graph's edges, from the logits down.

Readers are the candidate features and the logits. Each has a run of its own, in which a source writes its value if the
edge from it to the reader is there, and its ablation value if not. A feature's value is what its dictionary reads in
its own run; what counts is the logits' run. With all edges among some nodes C, and from them to the logits, this is the
patched model M_C. Attention runs free in every run, so an edge includes what attention carries.

Shape legend: n candidates, N prompts, B sequences, T positions, L decomposed layers, S slots, m dictionary size.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.records import LOGIT, AttributionGraph
from hagd.patching.objective import Objective
from hagd.tasks.records import Prompts


class EdgeModel:
    """The model on some prompts with every edge among candidates, any of which can be cut.

    Attributes:
        reads: bool `[n + 1, n]`, which sources each reader sees; the last reader is the logits.
        layer_of: int64 `[n + 1]`, place of each reader's layer among the decomposed ones; L for the logits.
    """

    def __init__(self, objective: Objective, flat: np.ndarray, index: Tensor) -> None:
        self._objective, self._patched, self._index = objective, objective.patched, index
        self._part = objective.prompts[index]
        self._slots = self._part.slots.flatten(0, 1)
        self._flat = torch.as_tensor(flat, device=objective.patched.lm.device)
        self._place = np.stack(np.unravel_index(flat, objective.patched.gate_shape))
        self.layer_of = np.append(self._place[0], objective.patched.gate_shape[0])
        self.reads = torch.ones(len(flat) + 1, len(flat), dtype=torch.bool, device=self._flat.device)
        everything = self._gates(self.reads[-1:])
        self._values = self._run(self._part, everything, None)[1]

    def logits(self) -> Tensor:
        """Of the logits' run, `[N, C, A, V]`."""
        return self._logits(self._values)

    def loss(self) -> float:
        """Mean loss over the prompts."""
        return self._loss(self._values)

    def cut(self, source: int, reader: int, alive: np.ndarray) -> tuple[float, Callable[[], None]]:
        """The loss without one more edge, and what makes the cut stay.

        Args:
            source: a candidate. reader: one of a later layer, or n for the logits.
            alive: bool `[n]`, readers on which the logits depend; only these are run again.
        """
        seen, values = self.reads[reader, source].clone(), self._values
        self.reads[reader, source] = False
        if reader < len(self._flat):
            values = self._read([reader], values)
            for layer in range(self.layer_of[reader] + 1, len(values)):
                values = self._read(np.flatnonzero(alive & (self._place[0] == layer)).tolist(), values)
        after = self._loss(values)
        self.reads[reader, source] = seen

        def stay() -> None:
            self.reads[reader, source] = False
            self._values = values

        return after, stay

    def _logits(self, values: Tensor) -> Tensor:
        return self._run(self._part, self._gates(self.reads[-1:]), values)[0]

    def _loss(self, values: Tensor) -> float:
        return float(self._objective.loss_of_logits(self._logits(values), self._index).mean())

    def _read(self, readers: list[int], values: Tensor) -> Tensor:
        """`values` with those of some readers of one layer read anew, each in its own run."""
        values = values.clone()
        at_once = max(1, self._objective.batch_size // len(self._index))
        for start in range(0, len(readers), at_once):
            some = readers[start : start + at_once]
            gates = self._gates(self.reads[some])
            owner = torch.arange(len(some)).repeat_interleave(len(self._index))
            part = self._objective.prompts[self._index.repeat(len(some))]
            _, read = self._run(part, gates, values.repeat(1, len(some), 1, 1), owner)
            for own, reader in zip(read.unflatten(1, (len(some), -1)).unbind(1), some, strict=True):
                layer, slot, feature = self._place[:, reader].tolist()
                here = self._slots == slot
                values[layer, here, feature] = own[layer, here, feature]
        return values

    def _gates(self, reads: Tensor) -> Tensor:
        """Gates `[G, L, S, m]` of sources `[G, n]` that are seen."""
        shape = self._patched.gate_shape
        closed = torch.zeros(len(reads), int(np.prod(shape)), device=reads.device)
        closed[:, self._flat] = reads.float()
        return closed.view(-1, *shape)

    def _run(
        self, part: Prompts, gates: Tensor, written: Tensor | None, owner: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        objective = self._objective
        return self._patched.reading(
            part, gates, written, ablation=objective.ablation, error=objective.error, owner=owner
        )


def by_edge_pruning(
    objective: Objective,
    graph: AttributionGraph,
    generator: torch.Generator,
    prompts: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Ranks `[n_candidates]` by how strong a path of edges to the logits survives.

    Readers are visited from the logits down, edges into one from the weakest up. An edge is cut for good unless that
    raises the loss by more than a threshold, and a reader from which no path to the logits is left is not visited. A
    single threshold gives a single circuit; here the rises rank all nodes: a node counts with the largest threshold at
    which a path from it would survive, `max_paths min_edges rise`, ties by attribution. Edges that the graph left out
    as too weak are not tested and stay.

    A test of an edge into a feature costs an evaluation of `prompts` for the feature, one for each surviving reader of
    later layers and one for the logits.
    """
    assert objective.patched.head_means is None  # the configuration refuses heads
    n = graph.n_candidates
    index = objective.sample(prompts, generator)
    model = EdgeModel(objective, graph.flat, index)
    closed = torch.zeros(1, *objective.patched.gate_shape, device=objective.patched.lm.device)
    threshold = float(objective.losses(closed, index)[0]) / n
    incoming = _incoming(graph)
    alive, strength = np.zeros(n, dtype=bool), np.full(n, -np.inf)
    before = model.loss()
    readers = np.argsort(-model.layer_of, kind="stable").tolist()
    for done, reader in enumerate(readers):
        limit = np.inf if reader == n else strength[reader]
        for source in incoming[reader] if reader == n or alive[reader] else ():
            after, stay = model.cut(source, reader, alive)
            strength[source] = max(strength[source], min(limit, after - before))
            if after - before > threshold:
                alive[source] = True
            else:
                before = after
                stay()
        if progress is not None:
            progress(done + 1, len(readers))
    ranks = np.empty(n)
    ranks[np.lexsort((graph.nodes.importance[:n], strength))] = np.arange(n)
    return ranks


def _incoming(graph: AttributionGraph) -> list[list[int]]:
    """Sources of the edges from candidates into each candidate and, last, the logits; weakest first."""
    n = graph.n_candidates
    found: list[list[int]] = [[] for _ in range(n + 1)]
    for edge in np.argsort(np.abs(graph.edge_attr), kind="stable").tolist():
        source, target = graph.edge_index[:, edge].tolist()
        reader = n if graph.nodes.kind[target] == LOGIT else target
        if source < n and reader <= n:
            found[reader].append(source)
    return found
