"""Which tokens make up which batch: pure functions of (seed, step), without replacement.

The tokens are drawn in epochs. An epoch visits every shard once, in an order of its own, and a shard's tokens in a
permutation of their own before the next shard comes, so that a shard is loaded once an epoch. Batches are consecutive
pieces of this endless sequence; one may end one shard, or one epoch, and begin the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hagd.activations.plan import Integers

_ORDER, _TOKENS = 2, 3
"""Second words of the seed."""


@dataclass(frozen=True)
class Span:
    """Consecutive draws out of one shard: places `first` to `first + count` of its permutation of `epoch`."""

    shard: int
    epoch: int
    first: int
    count: int


def spans(sizes: Sequence[int], seed: int, first: int, count: int) -> list[Span]:
    """The draws `first` to `first + count` from shards with `sizes` tokens."""
    found = []
    while count:
        epoch, offset = divmod(first, sum(sizes))
        for shard in shard_order(len(sizes), seed, epoch):
            taken = min(count, sizes[shard] - offset)
            if taken > 0:
                found.append(Span(shard, epoch, offset, taken))
                first, count = first + taken, count - taken
            offset = max(offset - sizes[shard], 0)
            if not count:
                break
    return found


def following(n_shards: int, seed: int, span: Span) -> int:
    """The shard whose turn comes after that of `span`."""
    order = shard_order(n_shards, seed, span.epoch)
    place = order.index(span.shard) + 1
    return order[place] if place < n_shards else shard_order(n_shards, seed, span.epoch + 1)[0]


@lru_cache(maxsize=4)
def shard_order(n_shards: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the shards."""
    return [int(shard) for shard in np.random.default_rng([seed, _ORDER, epoch]).permutation(n_shards)]


def tokens_of(span: Span, ordinary: Integers, size: int, seed: int) -> Integers:
    """Positions in the shard of the tokens that `span` draws.

    Outliers are not drawn. As their number is known only after the capture and the place of every later draw must not
    depend on it, a shard of `size` tokens gives `size` draws all the same: its permutation of the `ordinary` ones
    starts again, so each is drawn `size // len(ordinary)` times or once more.
    """
    order = ordinary[_permutation(len(ordinary), seed, span.epoch, span.shard)]
    return order[np.arange(span.first, span.first + span.count) % len(order)]


@lru_cache(maxsize=2)
def _permutation(n: int, seed: int, epoch: int, shard: int) -> Integers:
    return np.random.default_rng([seed, _TOKENS, epoch, shard]).permutation(n)
