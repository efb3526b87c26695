"""All edges of one prompt, from the last layer down, onto disk; or those into the most influential nodes.

Shape legend: N nodes, R rows (targets), k edges a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hagd.attribution.prompt.edge_file import EdgeWriter, StoredEdges
from hagd.attribution.prompt.frozen_model import FrozenModel
from hagd.attribution.prompt.influence import pass_down
from hagd.attribution.prompt.layout import Rows, Sources
from hagd.attribution.prompt.rows import Targets, edges_into, inner_batches
from hagd.transcoders.records import TranscoderSet

_ROUNDS = 4
"""Times that nodes are ranked anew while the most influential ones are sought."""


@dataclass(frozen=True)
class Computed:
    """Edges and what the whole rows say, also where only the strongest edges are stored.

    Attributes:
        edges: on disk.
        influence: `[N]`, of every node (`hagd.attribution.prompt.influence`).
        incoming: float64 `[N]`, sum of all edges into each target; 0 elsewhere.
        chosen: bool `[N]`, nodes of the graph: all, or without features and heads that were not among the most
            influential.
    """

    edges: StoredEdges
    influence: np.ndarray
    incoming: np.ndarray
    chosen: np.ndarray


class Calculation:
    """One prompt's edges.

    Args:
        model, sources, transcoders: the frozen model, what is written in it, and what reads.
        logits: the targets after the last layer, numbered from `len(sources)` on.
        weights: `[logits]`, their shares in what is explained.
        strongest: edges stored a target; None = all.
        directions: layer → `[T, H, e]`, along which heads that are nodes are read as targets.
        progress: called with targets done and targets in all.
    """

    def __init__(
        self,
        model: FrozenModel,
        sources: Sources,
        transcoders: TranscoderSet,
        logits: Targets,
        weights: np.ndarray,
        strongest: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        directions: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.sources = sources
        self.transcoders = transcoders
        self.logits = logits
        self.weights = np.concatenate([np.zeros(len(sources)), weights])
        self.strongest = strongest
        self.directions = directions or {}
        self.progress = progress
        self.incoming = np.zeros(len(self.weights))
        self._arrived = self.weights.copy()
        self._done = 0

    def all_features(self, folder: Path) -> Computed:
        """Edges into every active feature and every head that is a node."""
        with EdgeWriter(folder) as writer:
            total = self.sources.n_inner + len(self.logits)
            self.add(self.logits, writer, total)
            for batch in self._inner(None):
                self.add(batch, writer, total)
            edges = writer.stored()
        chosen = np.ones(len(self.weights), dtype=bool)
        return Computed(edges, self._arrived - self.weights, self.incoming, chosen)

    def most_influential(self, folder: Path, count: int) -> Computed:
        """Edges into the `count` features and heads with the most influence.

        They are ranked anew as edges into more of them are known.
        """
        n = self.sources.n_inner
        chosen = np.ones(len(self.weights), dtype=bool)
        chosen[:n] = False
        with EdgeWriter(folder) as writer:
            self.add(self.logits, writer, count + len(self.logits))
            edges = writer.stored()
            while (missing := count - int(chosen[:n].sum())) > 0:
                rank = pass_down(edges, self.weights)[:n]
                rank[chosen[:n]] = -1
                best = np.argsort(-rank)[: max(-(-count // _ROUNDS), 1)][:missing]
                chosen[best] = True
                for batch in self._inner(torch.from_numpy(best)):
                    self.add(batch, writer, count + len(self.logits))
                edges = writer.stored()
        return Computed(edges, pass_down(edges, self.weights, chosen), self.incoming, chosen)

    def _inner(self, chosen: Tensor | None) -> Iterator[Targets]:
        return inner_batches(self.model, self.sources, self.transcoders, self.directions, chosen)

    def add(self, batch: Targets, writer: EdgeWriter, total: int) -> None:
        """Compute the edges into `batch`, of `total` targets in all, and write them; what is above it came before."""
        rows = edges_into(self.model, self.sources, batch)
        size = rows.dense.abs()
        nodes = batch.nodes.cpu().numpy()
        self.incoming[nodes] = rows.dense.sum(1, dtype=torch.float64).cpu().numpy()
        totals = size.sum(1).clamp(min=1e-30)
        passed = torch.from_numpy(self._arrived[nodes]).to(totals) / totals
        self._arrived[rows.columns.numpy()] += (passed @ size).double().cpu().numpy()
        self._store(batch, rows, size, writer)
        self._done += len(batch)
        if self.progress is not None:
            self.progress(self._done, total)

    def _store(self, batch: Targets, rows: Rows, size: Tensor, writer: EdgeWriter) -> None:
        """By position: targets there have the same sources."""
        nodes, columns = batch.nodes.cpu().numpy(), rows.columns.numpy()
        start = 0
        for p, count in zip(*(x.tolist() for x in batch.positions.unique_consecutive(return_counts=True)), strict=True):
            where = slice(start, start + count)
            reachable = rows.reachable(p)
            if self.strongest is None or self.strongest >= len(reachable):
                values = rows.dense[where].cpu().numpy().take(reachable.numpy(), axis=1)
                writer.append(batch.depth, nodes[where], columns[reachable.numpy()], values)
            else:
                best = size[where].topk(self.strongest, dim=1, sorted=False).indices
                values = rows.dense[where].gather(1, best).cpu().numpy()
                writer.append(batch.depth, nodes[where], columns[best.cpu().numpy()], values)
            start += count
