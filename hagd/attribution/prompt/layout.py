"""Which node is which row and column of one prompt's edges, and where each node writes.

Nodes are numbered features (by layer, position, feature), heads where they are nodes (layer, position, head), errors
(layer, position), tokens (position), logits: all that writes comes first, so that a number is an identity and no two
kinds share one. Edges run from source to target; in a matrix, rows are targets and columns are sources.

Shape legend: T positions, P positions up to the last target of a batch, R rows (targets), n active features, H heads,
K layers whose heads are nodes, s sources (n + K·T·H + L·T + T), L layers, d = d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.attribution.prompt.frozen_model import Writer
from hagd.attribution.prompt.trace import ActiveFeatures
from hagd.transcoders.records import TranscoderSet


@dataclass(frozen=True)
class _Writers:
    """Features of one layer that write to one layer: `activation · decoder row`, by position.

    Attributes:
        vectors: `[k, d]`.
        columns: `[T + 1]`, those of the features of position p are `columns[p]` to `columns[p + 1]`.
    """

    vectors: Tensor
    columns: list[int]


class Sources:
    """Everything that is written to the residual stream of one prompt, as columns.

    Attributes:
        active: the features, in the order of their columns.
        errors: `[L, T, d]`. embedding: `[T, d]`.
        heads: layer → `[T, H, d]`, what its heads write, of layers whose heads are nodes, ascending.
        heads_at_position: H where heads are nodes, else 0.
    """

    def __init__(
        self,
        embedding: Tensor,
        active: ActiveFeatures,
        errors: Sequence[Tensor],
        transcoders: TranscoderSet,
        heads: Mapping[int, Tensor] | None = None,
    ) -> None:
        self.active = active
        self.errors = torch.stack(list(errors))
        self.embedding = embedding
        self.heads = {} if heads is None else dict(sorted(heads.items()))
        self.n_layers, self.n_positions, _ = self.errors.shape
        self.heads_at_position = next((written.shape[1] for written in self.heads.values()), 0)
        self._heads_a_layer = self.heads_at_position * self.n_positions
        # By layer and position; where a place has no feature, that of the next one.
        places = active.layer * self.n_positions + active.position
        every = torch.arange(self.n_layers * self.n_positions + 1, device=places.device)
        self._first: list[int] = torch.searchsorted(places, every).tolist()
        self._writers: dict[int, list[_Writers]] = {layer: [] for layer in range(self.n_layers)}
        for index, transcoder in enumerate(transcoders.transcoders):
            place = transcoder.layer * self.n_positions
            columns = self._first[place : place + self.n_positions + 1]
            own = slice(columns[0], columns[-1])
            rows, scale = active.feature[own], active.activation[own, None]
            decoders = (transcoder.W_dec, *transcoder.W_later)
            for decoder, layer in zip(decoders, transcoders.layers[index:], strict=False):
                self._writers[layer].append(_Writers((decoder[rows] * scale).to(embedding.dtype), columns))

    @property
    def n_features(self) -> int:
        """Active features: the first columns."""
        return len(self.active)

    @property
    def n_inner(self) -> int:
        """Features and heads, which edges enter and leave: the first columns."""
        return self.n_features + len(self.heads) * self._heads_a_layer

    def __len__(self) -> int:
        return self.n_inner + (self.n_layers + 1) * self.n_positions

    def features_below(self, layer: int) -> int:
        """Features of the layers below: the first so many columns."""
        return self._first[layer * self.n_positions]

    def heads_below(self, layer: int) -> int:
        """Heads of the layers below: the first so many columns after the features."""
        return sum(own < layer for own in self.heads) * self._heads_a_layer

    def width_below(self, layer: int) -> int:
        """Everything that targets that read at a layer can have as sources, heads of the layer itself included."""
        return self.features_below(layer) + self.heads_below(layer + 1) + (layer + 1) * self.n_positions

    def bounds(self, layer: int, position: int) -> tuple[int, int]:
        """Columns of the features of a layer at positions up to and including `position`."""
        return self.features_below(layer), self._first[layer * self.n_positions + position + 1]

    def error(self, layer: int) -> int:
        """Column of the first error of a layer; of the first token, for the number of layers."""
        return self.n_inner + layer * self.n_positions

    def written(self, layer: int) -> Tensor:
        """What all features and the error write to a layer, `[T, d]`; decoder bias and linear skip are not in it."""
        total = self.errors[layer].clone()
        for each in self._writers[layer]:
            counts = torch.diff(torch.tensor(each.columns, device=total.device))
            position = torch.arange(self.n_positions, device=total.device).repeat_interleave(counts)
            total.index_add_(0, position, each.vectors)
        return total

    def project(self, writer: Writer, layer: int, gradient: Tensor, positions: Tensor, rows: Rows) -> None:
        """Add to `rows` the products of gradients at what is written with what is written.

        Args:
            writer: what writes; of the MLP both features and error.
            layer: model layer.
            gradient: `[P, R, d]`, or `[R, d]` at each row's own position.
            positions: `[R]`, ascending.
            rows: what is added to.
        """
        if writer == "heads":
            self._project_heads(layer, gradient, positions, rows)
            return
        if writer == "embedding":
            own, others, writers = self.embedding, rows.tokens, list[_Writers]()
        else:
            own, writers = self.errors[layer], self._writers[layer]
            others = rows.errors[:, layer * self.n_positions : (layer + 1) * self.n_positions]
        if gradient.dim() == 3:
            n = len(gradient)
            others[:, :n] += torch.bmm(gradient, own[:n, :, None])[..., 0].T
            for each in writers:
                for p in range(n):
                    _multiply(gradient[p], each, p, rows.features, slice(None))
            return
        places = torch.arange(len(gradient), device=gradient.device)
        others[places, positions] += (gradient * own[positions]).sum(1)
        first = 0
        for p, count in zip(*(x.tolist() for x in positions.unique_consecutive(return_counts=True)), strict=True):
            where = slice(first, first + count)
            for each in writers:
                _multiply(gradient[where], each, p, rows.features, where)
            first += count

    def _project_heads(self, layer: int, gradient: Tensor, positions: Tensor, rows: Rows) -> None:
        written, start = self.heads[layer], self.heads_below(layer)
        own = rows.heads[:, start : start + self._heads_a_layer].view(-1, *written.shape[:2])
        if gradient.dim() == 3:
            n = len(gradient)
            own[:, :n] = torch.bmm(gradient, written[:n].transpose(1, 2)).transpose(0, 1)
        else:
            places = torch.arange(len(gradient), device=gradient.device)
            own[places, positions] = torch.bmm(written[positions], gradient[..., None])[..., 0]


def _multiply(gradient: Tensor, each: _Writers, p: int, features: Tensor, where: slice) -> None:
    start, first, last = each.columns[0], each.columns[p], each.columns[p + 1]
    if last > first:
        features[where, first:last].addmm_(gradient, each.vectors[first - start : last - start].T)


class Rows:
    """Edges into R targets that read at the same layer, dense over everything that is written below it.

    Attributes:
        dense: `[R, w]`: features below, heads below, errors below, tokens.
        features: `[R, features below]`. heads: `[R, heads below]`. errors: `[R, layers below · T]`. tokens: `[R, T]`;
            views of `dense`.
        columns: int64 `[w]`, number of each source.
    """

    def __init__(self, sources: Sources, layer: int, heads_end: int, count: int) -> None:
        """No edges yet, into `count` targets that read at `layer` (the number of layers: after the last one).

        Heads of layers below `heads_end` can be their sources.
        """
        below, heads = sources.features_below(layer), sources.heads_below(heads_end)
        sizes = [below, heads, layer * sources.n_positions, sources.n_positions]
        self.dense = sources.embedding.new_zeros(count, sum(sizes))
        self.features, self.heads, self.errors, self.tokens = self.dense.split(sizes, dim=1)
        first = [0, sources.n_features, sources.error(0), sources.error(sources.n_layers)]
        self.columns = torch.cat([torch.arange(start, start + size) for start, size in zip(first, sizes, strict=True)])
        self._sources, self._layer = sources, layer

    def reachable(self, position: int) -> Tensor:
        """Columns of `dense` that are written at positions up to `position`: all that a target there can have."""
        sources, layer = self._sources, self._layer
        spans = [sources.bounds(below, position) for below in range(layer)]
        start, end = self.features.shape[1], self.features.shape[1] + self.heads.shape[1]
        n = sources.n_positions
        for first, last, at_position in ((start, end, sources.heads_at_position), (end, self.dense.shape[1], 1)):
            spans += [(i, i + at_position * (position + 1)) for i in range(first, last, max(at_position * n, 1))]
        return torch.cat([torch.arange(first, last) for first, last in spans])
