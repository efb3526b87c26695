"""Token activations that train the transcoders: in memory when they fit, else in shards on disk.

Shape legend: L layers, n tokens, d = d_model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.activations.capture import Site, capture
from hagd.models.language_model import LanguageModel

MASSIVE = 10.0
"""A token whose activation norm exceeds this many medians is an outlier (attention sinks) and trains nothing."""

_STEPS_PER_SHARD = 64


@dataclass(frozen=True)
class Sequences:
    """Token ids `[N, T]` and which positions count `[N, T]` (padding does not)."""

    tokens: Tensor
    keep: Tensor


class ActivationShards:
    """Inputs and outputs of a site over many tokens; `batch(step)` is a pure function of seed and step."""

    def __init__(self, sources: Sequence[Path | tuple[Tensor, Tensor]], seed: int) -> None:
        self._sources = sources
        self._seed = seed
        self._loaded: tuple[int, tuple[Tensor, Tensor]] | None = None

    def shard(self, index: int) -> tuple[Tensor, Tensor]:
        """Inputs and outputs `[L, n, d]` of one shard; the last one read stays in memory."""
        if self._loaded is None or self._loaded[0] != index:
            source = self._sources[index]
            if isinstance(source, Path):
                tensors = load_file(source)
                source = tensors["x"], tensors["y"]
            self._loaded = index, source
        return self._loaded[1]

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """`size` random tokens of the shard whose turn it is, `[L, size, d]` twice."""
        x, y = self.shard((step // _STEPS_PER_SHARD) % len(self._sources))
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        index = torch.randint(x.shape[1], (size,), generator=generator)
        return x[:, index], y[:, index]


def collect(
    lm: LanguageModel,
    sequences: Sequence[Sequences],
    site: Site,
    layers: Sequence[int],
    *,
    shard_mb: int,
    folder: Path,
    seed: int,
    batch_size: int = 64,
    progress: Callable[[int, int], None] | None = None,
) -> ActivationShards:
    """Activations of every kept token of `sequences`.

    A shard that is already in `folder` is not computed again, so a killed run continues. `progress` is called
    with sequences done and to do.

    Raises:
        NumericalError: an activation is NaN or infinite.
    """
    total = sum(len(part.tokens) for part in sequences)
    positions = sum(int(part.keep.sum()) for part in sequences)
    size_mb = positions * len(layers) * lm.d_model * 8 / 2**20
    n_shards = max(1, math.ceil(size_mb / shard_mb))
    chunks = [
        Sequences(part.tokens[i : i + batch_size], part.keep[i : i + batch_size])
        for part in sequences
        for i in range(0, len(part.tokens), batch_size)
    ]
    per_shard = -(-len(chunks) // n_shards)
    done = 0
    sources: list[Path | tuple[Tensor, Tensor]] = []
    for index in range(0, len(chunks), per_shard):
        path = folder / f"activations-{len(sources):05d}.safetensors"
        part = chunks[index : index + per_shard]
        if path.exists():
            done += sum(len(chunk.tokens) for chunk in part)
            if progress is not None:
                progress(done, total)
        else:
            read = []
            for chunk in part:
                read.append(_tokens_of(lm, chunk, site, layers))
                done += len(chunk.tokens)
                if progress is not None:
                    progress(done, total)
            x, y = _without_outliers(*(torch.cat(side, dim=1) for side in zip(*read, strict=True)))
            if n_shards == 1:
                return ActivationShards([(x, y)], seed)
            folder.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            save_file({"x": x.contiguous(), "y": y.contiguous()}, partial)
            partial.replace(path)
        sources.append(path)
    return ActivationShards(sources, seed)


def _tokens_of(lm: LanguageModel, chunk: Sequences, site: Site, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
    x, y = capture(lm, chunk.tokens.to(lm.device), site, layers)
    keep = chunk.keep
    return x.cpu()[:, keep], y.cpu()[:, keep]


def _without_outliers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    ordinary = torch.ones(x.shape[1], dtype=torch.bool)
    for side in (x, y):
        norm = side.norm(dim=-1)
        ordinary &= (norm <= MASSIVE * norm.median(dim=1, keepdim=True).values).all(0)
    return x[:, ordinary], y[:, ordinary]
