"""Edges into batches of targets: their gradients start where they read and meet all that is written below.

Shape legend: R rows (targets), T positions, H heads, e width of a head, d = d_model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.attribution.prompt.frozen_model import FrozenModel, Reader
from hagd.attribution.prompt.layout import Rows, Sources
from hagd.transcoders.records import TranscoderSet

_STATE = 2**21
"""Entries of the gradient of one batch, positions × rows × d_model: as much as caches hold."""

_EDGES = 2**23
"""Entries of the dense edges of one batch."""

_MOST_ROWS, _FEWEST_ROWS = 512, 16


@dataclass(frozen=True)
class Targets:
    """Nodes that read at one layer.

    Attributes:
        layer: model layer; the number of layers for those that read after the last one.
        nodes: int64 `[R]`, their numbers.
        positions: int64 `[R]`, ascending.
        vectors: `[R, d]`, what they read along: encoder rows, combinations of unembedding rows, columns of a head's
            query or key projection, or a head's `FrozenModel.head_reads`.
        reads: what of the layer reads.
        heads: int64 `[R]`, where heads read.
    """

    layer: int
    nodes: Tensor
    positions: Tensor
    vectors: Tensor
    reads: Reader = "mlp"
    heads: Tensor | None = None

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def depth(self) -> int:
        """All sources of a target are of lower depth: heads of a layer are below its features, which may read them."""
        return 2 * self.layer + int(self.reads == "mlp")


def edges_into(model: FrozenModel, sources: Sources, targets: Targets) -> Rows:
    """All direct edges into `targets`: products of gradients and what each source writes."""
    rows = Rows(sources, targets.layer, model.heads_end(targets.layer, targets.reads), len(targets))
    at = (targets.positions, targets.vectors)
    if targets.layer == model.n_layers:
        start = model.at_unembedding(*at)
    elif targets.reads == "attention":
        start = model.at_attention_input(targets.layer, *at)
    elif targets.heads is not None:
        start = model.at_heads(targets.layer, targets.positions, targets.heads, targets.vectors)
    else:
        start = model.at_mlp_input(targets.layer, *at)
    model.pull(
        targets.layer,
        targets.positions,
        start,
        lambda writer, layer, gradient: sources.project(writer, layer, gradient, targets.positions, rows),
        targets.reads,
    )
    return rows


def inner_batches(
    model: FrozenModel,
    sources: Sources,
    transcoders: TranscoderSet,
    directions: Mapping[int, Tensor],
    chosen: Tensor | None = None,
) -> Iterator[Targets]:
    """Features and heads as targets, from the last layer down, in batches of one layer and near positions.

    Args:
        model, sources: of the prompt.
        transcoders: whose encoders read.
        directions: layer → `[T, H, e]`, along which the outputs of heads are read.
        chosen: int64, numbers of the nodes wanted; None = all.
    """
    encoders = {transcoder.layer: transcoder.W_enc for transcoder in transcoders.transcoders}
    for layer in range(model.n_layers - 1, -1, -1):
        if layer in encoders:
            first, last = sources.features_below(layer), sources.features_below(layer + 1)
            for part in _parts(sources, layer, torch.arange(first, last), sources.active.position[first:last], chosen):
                vectors = encoders[layer][sources.active.feature[part]].to(sources.embedding.dtype)
                yield Targets(layer, part, sources.active.position[part], vectors)
        if layer in directions:
            yield from _head_batches(model, sources, layer, directions[layer], chosen)


def _head_batches(
    model: FrozenModel, sources: Sources, layer: int, directions: Tensor, chosen: Tensor | None
) -> Iterator[Targets]:
    n_positions, n_heads, _ = directions.shape
    vectors = model.head_reads(layer, directions).flatten(0, 1)
    first = sources.n_features + sources.heads_below(layer)
    place = torch.arange(n_positions * n_heads)
    for part in _parts(sources, layer, place + first, place.to(vectors.device) // n_heads, chosen):
        own = part - first
        yield Targets(layer, part, own // n_heads, vectors[own], "heads", own % n_heads)


def _parts(sources: Sources, layer: int, nodes: Tensor, positions: Tensor, chosen: Tensor | None) -> Iterator[Tensor]:
    """`nodes` that read at `layer`, at ascending `positions`, as many together as make up a batch."""
    nodes = nodes.to(positions.device)
    if chosen is not None:
        wanted = torch.isin(nodes, chosen.to(nodes.device))
        nodes, positions = nodes[wanted], positions[wanted]
    width, start = sources.width_below(layer), 0
    while start < len(nodes):
        count = batch_rows(positions[start:], width, sources.embedding.shape[1])
        yield nodes[start : start + count]
        start += count


def batch_rows(positions: Tensor, width: int, d: int) -> int:
    """How many of the next targets, at ascending `positions`, make up a batch; they can have `width` sources."""
    ahead = positions[:_MOST_ROWS]
    count = torch.arange(1, len(ahead) + 1, device=ahead.device)
    fits = (count * (ahead + 1) * d <= _STATE) & (count * width <= _EDGES)
    return min(len(ahead), max(_FEWEST_ROWS, int(fits.sum())))
