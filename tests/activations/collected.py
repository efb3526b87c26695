"""Activations of a small model as the trainings get them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.activations.collect import Storage, collect
from hagd.activations.plan import Sequences
from hagd.activations.shards import ActivationShards
from hagd.config.activations import ActivationsConfig
from hagd.models.language_model import LanguageModel
from tests.builders import VOCABULARY

LENGTH = 32
STORAGES: tuple[Storage, ...] = get_args(Storage)


def sequences(n: int, seed: int = 0) -> Sequences:
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(n, LENGTH, generator=g) < 0.9
    return Sequences(torch.randint(VOCABULARY, (n, LENGTH), generator=g), keep)


# 2 layers × 16 wide × 8 bytes = 256 bytes a token: 700 sequences are some 20,000 tokens, 5 MB.
PARTS = (sequences(500), sequences(200, seed=1))
N_SHARDS = 3


def collected(
    lm: LanguageModel,
    folder: Path,
    storage: Storage = "memory",
    *,
    site: Site = "mlp",
    parts: tuple[Sequences, ...] = PARTS,
    progress: Callable[[int, int], None] | None = None,
    **changes: Any,
) -> ActivationShards:
    config = ActivationsConfig(**{"storage": storage, "memory_mb": 16, "buffer_tokens": 7000, **changes})
    return collect(lm, parts, site, (0, 1), config, folder=folder, seed=0, progress=progress)


def batches(shards: ActivationShards, steps: range = range(60)) -> list[tuple[Tensor, Tensor]]:
    """60 batches of 997 are three epochs; every eighth spans two shards."""
    return [shards.batch(step, 997) for step in steps]


def same(one: list[tuple[Tensor, Tensor]], other: list[tuple[Tensor, Tensor]]) -> bool:
    return all(torch.equal(a, b) for p, q in zip(one, other, strict=True) for a, b in zip(p, q, strict=True))


def rows(values: Tensor) -> Tensor:
    """Tokens of `[L, n, d]`, flat."""
    return values.transpose(0, 1).flatten(1)


def exact(values: Tensor) -> Counter[tuple[float, ...]]:
    return Counter(tuple(row) for row in rows(values).tolist())
