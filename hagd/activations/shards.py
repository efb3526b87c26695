"""Token activations that train the transcoders, in batches without replacement.

Shape legend: L layers, B tokens of a batch, n tokens of a shard, d = d_model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from hagd.activations.draws import following, spans, tokens_of
from hagd.activations.outliers import MASSIVE, Outliers
from hagd.activations.plan import Integers
from hagd.activations.reader import ShardActivations, ShardReader
from hagd.errors import NumericalError
from hagd.training.device import sent_ahead
from hagd.training.processes import rank_and_world

_CPU = torch.device("cpu")

_SAMPLE = 4
"""Second word of the seed; `hagd.activations.plan` and `hagd.activations.draws` use others."""


class ActivationShards:
    """Inputs and outputs of a site over many tokens, in batches that are pure functions of seed and step.

    Args:
        reader: reads the shards.
        seed: decides the batches.
        loaded: the first shard, or all of them: then they stay in memory.
        ahead: read the next shard in the background while one is drawn from.

    Attributes:
        n_tokens: draws of an epoch; each token that is no outlier is drawn once (`hagd.activations.draws`).
        outliers: which tokens are left out, measured on the first shard.
        seconds_waited: time spent in `batch` so far: reading, capturing, gathering.
    """

    def __init__(self, reader: ShardReader, seed: int, loaded: Sequence[ShardActivations], ahead: bool) -> None:
        self._reader = reader
        self._seed = seed
        self._sizes = [shard.n_tokens for shard in reader.shards]
        self._keep = len(loaded) == len(self._sizes)
        self._ahead = ahead and not self._keep
        self._coming: _Coming | None = None
        self.n_tokens = sum(self._sizes)
        self.outliers = Outliers.of(loaded[0].x_norm, loaded[0].y_norm)
        self.seconds_waited = 0.0
        self._copy: tuple[int, ShardActivations] | None = None
        self._loaded = {index: (shard, self._ordinary(shard)) for index, shard in enumerate(loaded)}

    def batch(
        self, step: int, size: int, share: tuple[int, int] | None = None, device: torch.device = _CPU
    ) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of the tokens of a step, `[L, B, d]` in float32 twice.

        Args:
            step: from 0 up.
            size: tokens of the batch, over all processes.
            share: (rank, world): every world-th token of it, from the rank-th on; None: what falls to this process of
                its group. A batch smaller than the group is not divided.
            device: where they are wanted. Another one than the CPU gets a copy of the shard that is drawn from, since
                gathering and sending every batch by itself takes longer than a step.

        Raises:
            NumericalError: a captured activation is NaN or infinite, or all tokens of a shard are outliers.
        """
        began = time.perf_counter()
        rank, world = share or rank_and_world()
        if size < world:
            rank, world = 0, 1
        picked: list[tuple[Tensor, Tensor]] = []
        place = 0
        for span in spans(self._sizes, self._seed, step * size, size):
            shard, ordinary = self._get(span.shard)
            if self._ahead:
                self._expect(following(len(self._sizes), self._seed, span))
            tokens = tokens_of(span, ordinary, self._sizes[span.shard], self._seed)
            picked.append(_pick(self._on(device, span.shard, shard), tokens[(rank - place) % world :: world]))
            place += span.count
        x, y = (sides[0] if len(sides) == 1 else torch.cat(sides, dim=1) for sides in zip(*picked, strict=True))
        self.seconds_waited += time.perf_counter() - began
        return x, y

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """At most `size` tokens of the first shard, no outliers, always the same: `[L, B, d]` in float32 twice."""
        shard, ordinary = self._get(0)
        return _pick(shard, np.random.default_rng([self._seed, _SAMPLE]).permutation(ordinary)[:size])

    def shard(self, index: int) -> tuple[Tensor, Tensor]:
        """All tokens of a shard that are no outliers, in the order of their capture: `[L, n, d]` in float32 twice."""
        return _pick(*self._get(index))

    def close(self) -> None:
        """End the background thread and free the memory."""
        self._forget()
        self._loaded.clear()
        self._copy = None

    def __enter__(self) -> ActivationShards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _get(self, index: int) -> tuple[ShardActivations, Integers]:
        """A shard and which of its tokens are no outliers."""
        if index not in self._loaded:
            coming = self._coming
            if coming is not None and coming.index == index and coming.process == os.getpid():
                shard = coming.take()
                self._coming = None
                self._loaded.clear()
            else:
                self._forget()
                self._loaded.clear()
                shard = self._reader.read(index)
            self._loaded[index] = shard, self._ordinary(shard)
        return self._loaded[index]

    def _on(self, device: torch.device, index: int, shard: ShardActivations) -> ShardActivations:
        """The shard on a device, which holds one at a time."""
        if shard.y.device == device:
            return shard
        if self._copy is None or self._copy[0] != index or self._copy[1].y.device != device:
            self._copy = None
            self._copy = index, shard.to(device)
        return self._copy[1]

    def _ordinary(self, shard: ShardActivations) -> Integers:
        ordinary = self.outliers.ordinary(shard.x_norm, shard.y_norm).nonzero()[:, 0].numpy()
        if not len(ordinary):
            raise NumericalError(
                f"activations of {self._reader.lm.name}: expected norms of at most {MASSIVE:g} medians of the first "
                f"shard, found none among {shard.y.shape[1]} tokens; raise transcoder.activations.buffer_tokens so "
                "that every shard has tokens of each kind"
            )
        return ordinary

    def _expect(self, index: int) -> None:
        """Begin to read a shard in the background."""
        if index in self._loaded or (self._coming is not None and self._coming.process == os.getpid()):
            return
        self._coming = _Coming(self._reader, index)

    def _forget(self) -> None:
        if self._coming is not None and self._coming.process == os.getpid():
            self._coming.cancel()
        self._coming = None


class _Coming:
    """A shard that a thread of this process reads. A fork does not inherit the thread, only this object."""

    def __init__(self, reader: ShardReader, index: int) -> None:
        self.index = index
        self.process = os.getpid()
        self._reader = reader
        self._stop = threading.Event()
        self._shard: ShardActivations | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="activations", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            self._shard = self._reader.read(self.index, stop=self._stop)
        except BaseException as error:  # raised again where the shard is wanted
            self._error = error

    def take(self) -> ShardActivations:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._shard is not None
        return self._shard

    def cancel(self) -> None:
        self._stop.set()
        self._thread.join()


def _pick(shard: ShardActivations, tokens: Integers) -> tuple[Tensor, Tensor]:
    index = sent_ahead(torch.from_numpy(tokens), shard.y.device)
    y = shard.y.index_select(1, index).float()
    return y if shard.x is shard.y else shard.x.index_select(1, index).float(), y
