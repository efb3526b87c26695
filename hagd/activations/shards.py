"""Token activations that train the transcoders, in batches without replacement.

Shape legend: L layers, B tokens of a batch, n tokens of a shard, d = d_model.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Ready:
    """A shard on some device, and the positions of its tokens that are no outliers."""

    shard: ShardActivations
    ordinary: Integers


class ActivationShards:
    """Inputs and outputs of a site over many tokens, in batches that are pure functions of seed and step.

    Args:
        reader: reads the shards.
        seed: decides the batches.
        loaded: the first shard, or all of them: then they stay in memory.
        ahead: read the next shard in the background while one is drawn from. Copies for another device than the CPU
            are always made ahead.

    Attributes:
        n_tokens: draws of an epoch; each token that is no outlier is drawn once (`hagd.activations.draws`).
        outliers: which tokens are left out, measured on the first shard.
        seconds_waited: time spent in `batch` so far: reading, capturing, gathering.
    """

    def __init__(self, reader: ShardReader, seed: int, loaded: Sequence[ShardActivations], ahead: bool) -> None:
        self._reader = reader
        self._seed = seed
        self._sizes = [shard.n_tokens for shard in reader.shards]
        self._ahead = ahead and len(loaded) < len(self._sizes)
        self._coming: _Coming | None = None
        self.n_tokens = sum(self._sizes)
        self.outliers = Outliers.of(loaded[0].x_norm, loaded[0].y_norm)
        self.seconds_waited = 0.0
        ready = [_Ready(shard, self._ordinary(shard)) for shard in loaded]
        self._kept = dict(enumerate(ready)) if len(ready) == len(self._sizes) else {}
        self._current: tuple[int, torch.device, _Ready] | None = (0, _CPU, ready[0])

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
            ready = self._get(span.shard, device)
            if self._ahead or device != _CPU:
                self._expect(following(len(self._sizes), self._seed, span), device)
            tokens = tokens_of(span, ready.ordinary, self._sizes[span.shard], self._seed)
            picked.append(_pick(ready.shard, tokens[(rank - place) % world :: world]))
            place += span.count
        x, y = (sides[0] if len(sides) == 1 else torch.cat(sides, dim=1) for sides in zip(*picked, strict=True))
        self.seconds_waited += time.perf_counter() - began
        return x, y

    def sample(self, size: int) -> tuple[Tensor, Tensor]:
        """At most `size` tokens of the first shard, no outliers, always the same: `[L, B, d]` in float32 twice."""
        first = self._get(0)
        return _pick(first.shard, np.random.default_rng([self._seed, _SAMPLE]).permutation(first.ordinary)[:size])

    def shard(self, index: int) -> tuple[Tensor, Tensor]:
        """All tokens of a shard that are no outliers, in the order of their capture: `[L, n, d]` in float32 twice."""
        ready = self._get(index)
        return _pick(ready.shard, ready.ordinary)

    def close(self) -> None:
        """End the background thread and free the memory."""
        self._forget()
        self._kept.clear()
        self._current = None

    def __enter__(self) -> ActivationShards:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _get(self, index: int, device: torch.device = _CPU) -> _Ready:
        """A shard on a device. Of shards that are not kept there is one at a time, and one that is coming."""
        if self._current is None or self._current[:2] != (index, device):
            coming, self._current = self._coming, None
            if coming is not None and coming.is_for(index, device):
                self._coming = None
                ready = coming.take()
            else:
                self._forget()
                ready = self._read(index, device)
            self._current = index, device, ready
        return self._current[2]

    def _read(self, index: int, device: torch.device, stop: threading.Event | None = None) -> _Ready:
        ready = self._kept.get(index)
        if ready is None:
            shard = self._reader.read(index, stop=stop)
            ready = _Ready(shard, self._ordinary(shard))
        return ready if device == _CPU else _Ready(ready.shard.on(device), ready.ordinary)

    def _ordinary(self, shard: ShardActivations) -> Integers:
        ordinary = self.outliers.ordinary(shard.x_norm, shard.y_norm).nonzero()[:, 0].numpy()
        if not len(ordinary):
            raise NumericalError(
                f"activations of {self._reader.lm.name}: expected norms of at most {MASSIVE:g} medians of the first "
                f"shard, found none among {shard.y.shape[1]} tokens; raise transcoder.activations.buffer_tokens so "
                "that every shard has tokens of each kind"
            )
        return ordinary

    def _expect(self, index: int, device: torch.device) -> None:
        """Begin to bring a shard to a device in the background."""
        if self._current is not None and self._current[:2] == (index, device):
            return
        if self._coming is None or self._coming.process != os.getpid():
            self._coming = _Coming(self._read, index, device)

    def _forget(self) -> None:
        if self._coming is not None and self._coming.process == os.getpid():
            self._coming.cancel()
        self._coming = None


class _Coming:
    """A shard that a thread of this process reads. A fork does not inherit the thread, only this object."""

    def __init__(
        self, read: Callable[[int, torch.device, threading.Event], _Ready], index: int, device: torch.device
    ) -> None:
        self.process = os.getpid()
        self._place = index, device
        self._stop = threading.Event()
        self._ready: _Ready | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(read,), name="activations", daemon=True)
        self._thread.start()

    def _run(self, read: Callable[[int, torch.device, threading.Event], _Ready]) -> None:
        try:
            self._ready = read(*self._place, self._stop)
        except BaseException as error:  # raised again where the shard is wanted
            self._error = error

    def is_for(self, index: int, device: torch.device) -> bool:
        """Whether it brings this, to this process."""
        return self._place == (index, device) and self.process == os.getpid()

    def take(self) -> _Ready:
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._ready is not None
        return self._ready

    def cancel(self) -> None:
        self._stop.set()
        self._thread.join()


def _pick(shard: ShardActivations, tokens: Integers) -> tuple[Tensor, Tensor]:
    index = sent_ahead(torch.from_numpy(tokens), shard.y.device)
    y = shard.y.index_select(1, index).float()
    return y if shard.x is shard.y else shard.x.index_select(1, index).float(), y
