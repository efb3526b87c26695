"""The sizes of a prompt's graph that decide its cost, and the batches that they lead to.

Shape legend: T positions, L layers, d = d_model, H heads, K heads of keys and values, e width of a head, m dictionary
size, k active features a token, R rows (targets).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.attribution.prompt.rows import batch_rows


@dataclass(frozen=True)
class PromptShape:
    """Everything that decides the cost.

    Attributes:
        n_layers, d, heads, kv_heads, head: L, d, H, K, e.
        parameters: of the model. weight_bytes: of each.
        positions: T.
        decomposed: layers with a dictionary.
        m, k: of the dictionaries.
        skip_first: no features at the first position.
        cross_layer: features write to every later decomposed layer.
        strongest: edges stored a target, None = all.
        most: features and heads that are targets, None = all.
        logits: logit nodes, at most.
        head_layers: whose heads are nodes.
        parallel: attention and MLP of a layer read the same.
    """

    n_layers: int
    d: int
    heads: int
    kv_heads: int
    head: int
    parameters: int
    weight_bytes: int
    positions: int
    decomposed: tuple[int, ...]
    m: int
    k: int
    skip_first: bool
    cross_layer: bool
    strongest: int | None
    most: int | None
    logits: int
    head_layers: tuple[int, ...] = ()
    parallel: bool = False

    @property
    def active(self) -> int:
        """Active features."""
        return len(self.decomposed) * self.k * (self.positions - int(self.skip_first))

    def decomposed_below(self, layer: int) -> int:
        """Dictionaries of lower layers."""
        return sum(own < layer for own in self.decomposed)

    @property
    def inner(self) -> int:
        """Active features, and heads that are nodes."""
        return self.active + len(self.head_layers) * self.positions * self.heads

    @property
    def width(self) -> int:
        """Everything that writes."""
        return self.inner + (self.n_layers + 1) * self.positions

    def heads_below(self, layer: int) -> int:
        """Lower layers whose heads are nodes."""
        return sum(own < layer for own in self.head_layers)

    def batches(self) -> Iterator[PlannedBatch]:
        """Those of the logits, and of features and heads as `inner_batches` makes them."""
        last = self.positions - 1
        yield PlannedBatch(self.n_layers, torch.full((self.logits,), last), False)
        features = torch.arange(int(self.skip_first), self.positions).repeat_interleave(self.k)
        heads = torch.arange(self.positions).repeat_interleave(self.heads)
        for layers, every, of_heads in ((self.decomposed, features, False), (self.head_layers, heads, True)):
            for layer in layers:
                at_position = (
                    self.k * self.decomposed_below(layer) + self.heads * self.heads_below(layer + 1) + layer + 1
                )
                start = 0
                while start < len(every):
                    count = batch_rows(every[start:], at_position * self.positions, self.d)
                    yield PlannedBatch(layer, every[start : start + count], of_heads)
                    start += count

    def reachable(self, layer: int, position: int, of_head: bool) -> int:
        """Edges stored into one target."""
        features = self.decomposed_below(layer) * self.k * (position + 1 - int(self.skip_first))
        heads = self.heads_below(layer if of_head or self.parallel else layer + 1) * self.heads
        count = features + (heads + layer + 1) * (position + 1)
        return count if self.strongest is None else min(count, self.strongest)


@dataclass(frozen=True)
class PlannedBatch:
    """Targets at one layer (the number of layers: logits), their positions `[R]`, and whether they are heads."""

    layer: int
    positions: Tensor
    of_heads: bool
