"""Who is compared in `transcoder_quality.py`, and with which batch and rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from captured import Site

OWN = ("decoder_rate", "warmup_fraction", "dead_fraction")
"""Settings of ours that a row names where they are not the default."""


@dataclass(frozen=True)
class Contender:
    """A package in one mode.

    Attributes:
        loop: its training loop in `peers.py` or `ours.py`.
        rate: its default learning rate, for m = 2¹⁴ where it depends on m.
        by_size: its default rate falls with √m.
        batch: tokens a step. For the peers what a pilot showed to be best (`--batch` repeats it), for us the recipe's.
        small_batch: the same for dictionaries of fewer than a thousand features; None: no other.
        small_rate: their learning rate; None: no other.
        long_batch: tokens a step with 400,000 tokens or more, for larger ones; None: no other.
        own: further settings of ours, for larger ones with fewer tokens; by name, of `OWN`.
        small_own, long_own: the same of the others.
    """

    name: str
    loop: str
    site: Site
    rate: float
    by_size: bool = False
    skip: bool = False
    batch: int = 512
    small_batch: int | None = None
    small_rate: float | None = None
    long_batch: int | None = None
    own: Mapping[str, float] = field(default_factory=dict)
    small_own: Mapping[str, float] = field(default_factory=dict)
    long_own: Mapping[str, float] = field(default_factory=dict)

    @property
    def tuned(self) -> bool:
        """Whether the rate is searched."""
        return not self.name.startswith("ours")

    def at(self, m: int, n_tokens: int) -> Contender:
        """The contender with the batch and rates that it takes for m features and as many tokens."""
        if m < 1000:
            batch, rate = self.small_batch or self.batch, self.small_rate or self.rate
            return replace(self, batch=batch, rate=rate, own=self.small_own)
        if n_tokens < 400_000:
            return self
        return replace(self, batch=self.long_batch or self.batch, own=self.long_own)

    def default_rate(self, m: int) -> float:
        """Learning rate that the package takes by itself."""
        return self.rate / math.sqrt(m / 2**14) if self.by_size else self.rate


_SIGNUM, _SCALING_LAW, _RECIPE = 5e-3, 2e-4, 3.5e-3

CONTENDERS = (
    Contender("ours transcoder", "ours", "mlp", _RECIPE, batch=256, small_batch=128),
    Contender("ours_bf16 transcoder", "ours_bf16", "mlp", _RECIPE, batch=256, small_batch=128),
    Contender("ours_int8 transcoder", "ours_int8", "mlp", _RECIPE, batch=256, small_batch=128),
    Contender("ours transcoder, skip", "ours", "mlp", _RECIPE, skip=True, batch=256, small_batch=128),
    Contender(
        "ours autoencoder",
        "ours",
        "resid",
        9e-4,
        batch=64,
        small_rate=_RECIPE,
        long_batch=128,
        own={"decoder_rate": 3.0, "warmup_fraction": 0.02},
        small_own={"dead_fraction": 0.01},
        long_own={"decoder_rate": 3.0},
    ),
    Contender("sparsify transcoder", "sparsify_transcoder", "mlp", _SIGNUM, by_size=True, batch=1024),
    Contender("sparsify transcoder, skip", "sparsify_transcoder", "mlp", _SIGNUM, by_size=True, skip=True, batch=1024),
    Contender("sparsify autoencoder", "sparsify_autoencoder", "resid", _SIGNUM, by_size=True, batch=1024),
    Contender(
        "dictionary_learning autoencoder", "dictionary_learning_autoencoder", "resid", _SCALING_LAW, by_size=True
    ),
    Contender("SAELens autoencoder", "saelens_autoencoder", "resid", 3e-4),
)
"""SAELens and dictionary_learning train no TopK transcoders, so sparsify is the only peer there."""
