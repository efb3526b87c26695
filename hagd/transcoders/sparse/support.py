"""Which features are active on which token.

Shape legend: B tokens, n active pairs in all, m features.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hagd.transcoders.sparse.cpu_products import ordered_pairs
from hagd.transcoders.sparse.device_kernels import compiled


@dataclass(frozen=True)
class Support:
    """Which features are active on which token, in compressed rows.

    Attributes:
        index: int64 `[n]`, features, token after token.
        offsets: int64 `[B + 1]`; token t owns `index[offsets[t]:offsets[t + 1]]`.
        m: number of features.
    """

    index: Tensor
    offsets: Tensor
    m: int

    @classmethod
    def of_counts(cls, index: Tensor, counts: Tensor, m: int) -> Support:
        """Of features `[n]`, token after token, and how many each token has, `[B]`."""
        return cls(index, torch.cat([counts.new_zeros(1), counts.cumsum(0)]), m)

    @property
    def n_tokens(self) -> int:
        """B."""
        return len(self.offsets) - 1

    @cached_property
    def token(self) -> Tensor:
        """int64 `[n]`: the token of every pair."""
        tokens = torch.arange(self.n_tokens, device=self.index.device)
        return tokens.repeat_interleave(self.offsets.diff(), output_size=len(self.index))

    @property
    def in_any_order(self) -> tuple[Tensor, Tensor, Tensor]:
        """`by_part_and_feature` of as many parts as it was asked for first, or of one: sums in it round accordingly."""
        return next(iter(self._ordered.values()), None) or self.by_part_and_feature(1)

    def by_part_and_feature(self, n_parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `by_feature`, one part of the tokens after another, nearly the same number each: offsets `[parts · m]`."""
        if n_parts not in self._ordered:
            self._ordered[n_parts] = self.by_feature if n_parts == 1 else self._order(n_parts)
        return self._ordered[n_parts]

    @cached_property
    def _ordered(self) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
        return {}

    def _order(self, n_parts: int) -> tuple[Tensor, Tensor, Tensor]:
        n_tokens = -(-self.n_tokens // n_parts)
        keys = (self.token // n_tokens * self.m + self.index).to(torch.int32)
        keys, order = torch.sort(keys, stable=True)
        every = torch.arange(n_parts * self.m, dtype=keys.dtype, device=keys.device)
        return order, self.token.index_select(0, order), torch.searchsorted(keys, every)

    @cached_property
    def by_feature(self) -> tuple[Tensor, Tensor, Tensor]:
        """The pairs ordered by feature: permutation `[n]`, their tokens `[n]`, offsets `[m]`."""
        if compiled(self.m, self.index):
            return ordered_pairs(self.index, self.offsets, self.m)
        if self.index.device.type == "cpu" and self.m <= 2**16:  # NumPy sorts 16 bits by radix
            order = torch.from_numpy(np.argsort(self.index.numpy().astype(np.uint16), kind="stable"))
            features = self.index.index_select(0, order)
        else:
            keys = self.index.to(torch.int16 if self.m <= 2**15 else torch.int32)  # fewer bits sort faster
            features, order = torch.sort(keys, stable=True)
        starts = torch.searchsorted(features, torch.arange(self.m, dtype=features.dtype, device=features.device))
        return order, self.token.index_select(0, order), starts

    def parts(self, n_tokens: int) -> list[Support]:
        """Consecutive parts of at most so many tokens, nearly the same number each; on a CUDA device this waits for it.

        The same ones each time, so that what they know of themselves is found once.
        """
        if n_tokens >= self.n_tokens:
            return [self]  # not kept: what holds itself is freed late
        if n_tokens not in self._parts:
            self._parts[n_tokens] = self._split(-(-self.n_tokens // -(-self.n_tokens // n_tokens)))
        return self._parts[n_tokens]

    @cached_property
    def _parts(self) -> dict[int, list[Support]]:
        return {}

    def _split(self, n_tokens: int) -> list[Support]:
        bounds = [*range(0, self.n_tokens, n_tokens), self.n_tokens]
        places = self.offsets[bounds].tolist()
        return [
            Support(self.index[first:last], self.offsets[start : stop + 1] - first, self.m)
            for start, stop, first, last in zip(bounds[:-1], bounds[1:], places[:-1], places[1:], strict=True)
        ]
