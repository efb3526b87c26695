"""Which node is which row and column of one prompt's edges, and where each node writes.

Nodes are numbered features (by layer, position, feature), errors (layer, position), tokens (position), logits: all
that writes comes first, so that a number is an identity and no two kinds share one. Edges run from source to target;
in a matrix, rows are targets and columns are sources.

Shape legend: T positions, P positions up to the last target of a batch, R rows (targets), n active features,
s sources (n + L·T + T), L layers, d = d_model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.attribution.prompt.trace import ActiveFeatures
from hagd.transcoders.records import TranscoderSet


@dataclass(frozen=True)
class _Writers:
    """Features of one layer that write to one layer: `activation · decoder row`, by position.

    Attributes:
        first: column of the first of them.
        vectors: `[k, d]`.
        bounds: the features of position p are `bounds[p]` to `bounds[p + 1]` of them.
    """

    first: int
    vectors: Tensor
    bounds: list[int]


class Sources:
    """Everything that is written to the residual stream of one prompt, as columns.

    Attributes:
        active: the features, in the order of their columns.
        errors: `[L, T, d]`. embedding: `[T, d]`.
    """

    def __init__(
        self, embedding: Tensor, active: ActiveFeatures, errors: Sequence[Tensor], transcoders: TranscoderSet
    ) -> None:
        self.active = active
        self.errors = torch.stack(list(errors))
        self.embedding = embedding
        self.n_layers, self.n_positions, _ = self.errors.shape
        self._first = torch.searchsorted(
            active.layer, torch.arange(self.n_layers + 1, device=active.layer.device)
        ).tolist()
        self._writers: dict[int, list[_Writers]] = {layer: [] for layer in range(self.n_layers)}
        for index, transcoder in enumerate(transcoders.transcoders):
            first, last = self._first[transcoder.layer], self._first[transcoder.layer + 1]
            rows, scale = active.feature[first:last], active.activation[first:last, None]
            inside = torch.arange(self.n_positions + 1, device=rows.device)
            bounds = torch.searchsorted(active.position[first:last].contiguous(), inside).tolist()
            decoders = (transcoder.W_dec, *transcoder.W_later)
            for decoder, layer in zip(decoders, transcoders.layers[index:], strict=False):
                self._writers[layer].append(_Writers(first, (decoder[rows] * scale).to(embedding.dtype), bounds))

    @property
    def n_features(self) -> int:
        """Active features: the first columns."""
        return len(self.active)

    def __len__(self) -> int:
        return self.n_features + (self.n_layers + 1) * self.n_positions

    def features_below(self, layer: int) -> int:
        """Features of the layers below: the first so many columns."""
        return self._first[layer]

    def width_below(self, layer: int) -> int:
        """Everything that targets that read at a layer can have as sources."""
        return self._first[layer] + (layer + 1) * self.n_positions

    def bounds(self, layer: int, position: int) -> tuple[int, int]:
        """Columns of the features of a layer at positions up to and including `position`."""
        first, last = self._first[layer], self._first[layer + 1]
        inside = self.active.position[first:last]
        return first, first + int(torch.searchsorted(inside, position, right=True))

    def error(self, layer: int) -> int:
        """Column of the first error of a layer; of the first token, for the number of layers."""
        return self.n_features + layer * self.n_positions

    def written(self, layer: int) -> Tensor:
        """What all features and the error write to a layer, `[T, d]`; decoder bias and linear skip are not in it."""
        total = self.errors[layer].clone()
        for each in self._writers[layer]:
            counts = torch.diff(torch.tensor(each.bounds, device=total.device))
            position = torch.arange(self.n_positions, device=total.device).repeat_interleave(counts)
            total.index_add_(0, position, each.vectors)
        return total

    def project(self, layer: int, gradient: Tensor, positions: Tensor, rows: Rows) -> None:
        """Add to `rows` the products of gradients at what a layer writes (−1: the embedding) with what is written.

        Args:
            layer: model layer.
            gradient: `[P, R, d]`, or `[R, d]` at each row's own position.
            positions: `[R]`, ascending.
            rows: what is added to.
        """
        own = self.embedding if layer < 0 else self.errors[layer]
        others = rows.tokens if layer < 0 else rows.errors[:, layer * self.n_positions : (layer + 1) * self.n_positions]
        writers = [] if layer < 0 else self._writers[layer]
        if gradient.dim() == 3:
            n = len(gradient)
            others[:, :n] += torch.bmm(gradient, own[:n, :, None])[..., 0].T
            for each in writers:
                for p in range(n):
                    _multiply(gradient[p], each, p, rows.features, slice(None))
            return
        places = torch.arange(len(gradient), device=gradient.device)
        others[places, positions] += (gradient * own[positions]).sum(1)
        for p, count in zip(*(x.tolist() for x in positions.unique_consecutive(return_counts=True)), strict=True):
            first = int(torch.searchsorted(positions, p))
            where = slice(first, first + count)
            for each in writers:
                _multiply(gradient[where], each, p, rows.features, where)


def _multiply(gradient: Tensor, each: _Writers, p: int, features: Tensor, where: slice) -> None:
    first, last = each.bounds[p], each.bounds[p + 1]
    if last > first:
        block = features[where, each.first + first : each.first + last]
        block.addmm_(gradient, each.vectors[first:last].T)


class Rows:
    """Edges into R targets that read at the same layer, dense over everything that is written below it.

    Attributes:
        dense: `[R, w]`: features below, errors below, tokens.
        features: `[R, features below]`. errors: `[R, layers below · T]`. tokens: `[R, T]`; views of `dense`.
        columns: int64 `[w]`, number of each source.
    """

    def __init__(self, sources: Sources, layer: int, count: int) -> None:
        """No edges yet, into `count` targets that read at `layer` (the number of layers: after the last one)."""
        below, errors = sources.features_below(layer), layer * sources.n_positions
        width = sources.width_below(layer)
        self.dense = sources.embedding.new_zeros(count, width)
        self.features, self.errors, self.tokens = self.dense.split([below, errors, sources.n_positions], dim=1)
        self.columns = torch.arange(width)
        self.columns[below:] += sources.n_features - below
        self.columns[below + errors :] += (sources.n_layers - layer) * sources.n_positions
        self._sources, self._layer = sources, layer

    def reachable(self, position: int) -> Tensor:
        """Columns of `dense` that are written at positions up to `position`: all that a target there can have."""
        sources, layer = self._sources, self._layer
        spans = [sources.bounds(below, position) for below in range(layer)]
        start = sources.features_below(layer)
        spans += [(start + i * sources.n_positions,) * 2 for i in range(layer + 1)]
        spans[layer:] = [(first, first + position + 1) for first, _ in spans[layer:]]
        return torch.cat([torch.arange(first, last) for first, last in spans])
