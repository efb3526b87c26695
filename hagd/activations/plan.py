"""Which sequences make up which shard, before anything is computed: a pure function of the sequences and the seed.

Shape legend: N sequences, T positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hagd.models.language_model import TOKENS_A_PASS, rows_a_pass

_STREAM = 1
"""Second word of the seed, so that the plan and the draws of `hagd.activations.draws` are independent."""

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sequences:
    """Token ids `[N, T]` (any integer type, may be memory-mapped) and which positions count (padding does not).

    Attributes:
        tokens: `[N, T]`.
        keep: boolean `[N, T]`; None: all positions count.
    """

    tokens: Tensor
    keep: Tensor | None = None

    def kept(self) -> Integers:
        """Positions that count, by sequence `[N]`."""
        if self.keep is None:
            return np.full(len(self.tokens), self.tokens.shape[1])
        return self.keep.sum(1).numpy()

    def take(self, rows: Integers) -> tuple[Tensor, Tensor]:
        """Token ids (int64) and mask of some rows, both `[len(rows), T]`."""
        index = torch.from_numpy(rows)
        tokens = self.tokens[index].long()
        keep = torch.ones_like(tokens, dtype=torch.bool) if self.keep is None else self.keep[index]
        return tokens, keep


@dataclass(frozen=True)
class Part:
    """Sequences of one source that are captured, and stored in one file, together.

    Attributes:
        source: index of the `Sequences`.
        rows: its rows, ascending.
        first: position of its first token in the shard.
        n_tokens: tokens that count.
    """

    source: int
    rows: Integers
    first: int
    n_tokens: int


@dataclass(frozen=True)
class Shard:
    """Tokens that are in memory, and shuffled, at the same time."""

    parts: tuple[Part, ...]

    @property
    def n_tokens(self) -> int:
        """Tokens that count."""
        return sum(part.n_tokens for part in self.parts)

    @property
    def n_sequences(self) -> int:
        """Sequences of all parts."""
        return sum(len(part.rows) for part in self.parts)


def plan_shards(sequences: Sequence[Sequences], buffer_tokens: int, part_tokens: int, seed: int) -> tuple[Shard, ...]:
    """All sequences with tokens that count, shuffled and divided into shards of nearly equal size.

    Args:
        sequences: the sources.
        buffer_tokens: tokens of a shard at most, give or take a sequence.
        part_tokens: positions of a part at most, rounded down to whole forward passes; one pass is in it in any case.
        seed: decides which sequences come together.
    """
    counts = [part.kept() for part in sequences]
    kept = np.concatenate(counts)
    source = np.repeat(np.arange(len(sequences)), [len(count) for count in counts])
    row = np.concatenate([np.arange(len(count)) for count in counts])
    order = np.random.default_rng([seed, _STREAM]).permutation(len(kept))
    order = order[kept[order] > 0]
    total = int(kept.sum())
    n_shards = -(-total // buffer_tokens)
    first = np.cumsum(kept[order]) - kept[order]
    shard_of = first * n_shards // total  # where the first token of a sequence falls
    shards = []
    for members in np.split(order, np.flatnonzero(np.diff(shard_of)) + 1):
        parts: list[Part] = []
        position = 0
        for index in np.unique(source[members]):
            rows = np.sort(row[members[source[members] == index]])
            step = rows_a_pass(sequences[index].tokens.shape[1])
            per_part = step * max(1, part_tokens // TOKENS_A_PASS)
            for start in range(0, len(rows), per_part):
                chosen = rows[start : start + per_part]
                n_tokens = int(counts[index][chosen].sum())
                parts.append(Part(int(index), chosen, position, n_tokens))
                position += n_tokens
        shards.append(Shard(tuple(parts)))
    return tuple(shards)
