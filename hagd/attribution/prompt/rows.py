"""Edges into batches of targets: their gradients start where they read and meet all that is written below.

Shape legend: R rows (targets), d = d_model, s sources.
"""

from __future__ import annotations

from collections.abc import Iterator
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
        vectors: `[R, d]`, what they read along: encoder rows, combinations of unembedding rows, or columns of a head's
            query or key projection.
        reads: what of the layer reads.
    """

    layer: int
    nodes: Tensor
    positions: Tensor
    vectors: Tensor
    reads: Reader = "mlp"

    def __len__(self) -> int:
        return len(self.nodes)


def edges_into(model: FrozenModel, sources: Sources, targets: Targets) -> Rows:
    """All direct edges into `targets`: products of gradients and what each source writes."""
    rows = Rows(sources, targets.layer, len(targets))
    at = (targets.positions, targets.vectors)
    if targets.layer == model.n_layers:
        start = model.at_unembedding(*at)
    elif targets.reads == "attention":
        start = model.at_attention_input(targets.layer, *at)
    else:
        start = model.at_mlp_input(targets.layer, *at)
    model.pull(
        targets.layer,
        targets.positions,
        start,
        lambda layer, gradient: sources.project(layer, gradient, targets.positions, rows),
        targets.reads,
    )
    return rows


def feature_batches(sources: Sources, transcoders: TranscoderSet, chosen: Tensor | None = None) -> Iterator[Targets]:
    """Features as targets, from the last layer down, in batches of one layer and near positions.

    Args:
        sources: of the prompt.
        transcoders: whose encoders read.
        chosen: int64, numbers of the features wanted; None = all.
    """
    for transcoder in reversed(transcoders.transcoders):
        first, last = sources.features_below(transcoder.layer), sources.features_below(transcoder.layer + 1)
        nodes = torch.arange(first, last, device=sources.active.layer.device)
        if chosen is not None:
            nodes = nodes[torch.isin(nodes, chosen)]
        width = sources.width_below(transcoder.layer)
        start = 0
        while start < len(nodes):
            count = batch_rows(sources.active.position[nodes[start:]], width, sources.embedding.shape[1])
            part = nodes[start : start + count]
            vectors = transcoder.W_enc[sources.active.feature[part]].to(sources.embedding.dtype)
            yield Targets(transcoder.layer, part, sources.active.position[part], vectors)
            start += count


def batch_rows(positions: Tensor, width: int, d: int) -> int:
    """How many of the next targets, at ascending `positions`, make up a batch; they can have `width` sources."""
    ahead = positions[:_MOST_ROWS]
    count = torch.arange(1, len(ahead) + 1, device=ahead.device)
    fits = (count * (ahead + 1) * d <= _STATE) & (count * width <= _EDGES)
    return min(len(ahead), max(_FEWEST_ROWS, int(fits.sum())))
