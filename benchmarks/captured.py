"""Activations in files that every contender reads in the same order, and the model they come from.

Shape legend: n tokens, N sequences, T positions, d = d_model, m dictionary size, k active features.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.activations.capture import Site
from hagd.models.language_model import LanguageModel

MASSIVE = 10.0
"""A token whose norm exceeds this many medians of the training tokens, in or out, is left out for everybody."""

SITES: tuple[Site, ...] = ("mlp", "resid")


@dataclass(frozen=True)
class SitePlace:
    """Where activations are read: an MLP's input and output, or the residual stream after a layer."""

    site: Site
    layer: int

    @property
    def name(self) -> str:
        """Stem of its files."""
        return f"{self.site}{self.layer}"


@dataclass(frozen=True)
class Captured:
    """One place's tokens `[n, d]`, shuffled, without massive ones. `y` is `x` itself for the residual stream.

    Attributes:
        x_limit: largest norm of an input that is not massive.
        y_limit: the same of an output.
    """

    x: Tensor
    y: Tensor
    x_limit: float
    y_limit: float


@dataclass(frozen=True)
class Subject:
    """A model whose activations lie in files, and the dictionaries that are trained on them.

    Attributes:
        cache: folder of `write`'s files: for every place the splits train, selection and heldout.
        text: held-out token ids `[N, T]` on which the model's loss is measured.
        scored: the loss is that of `text[:, scored:]`, each token predicted from those before.
        m: dictionary size.
        n_train: tokens of a training.
        layers: at the first of them learning rates are chosen.
    """

    name: str
    cache: Path
    lm: LanguageModel
    text: Tensor
    scored: int
    m: int
    k: int
    n_train: int
    layers: tuple[int, ...]

    def load(self, place: SitePlace, split: str) -> Captured:
        """What `write` wrote."""
        tensors = load_file(self.cache / f"{place.name}-{split}.safetensors")
        limits = json.loads((self.cache / f"{place.name}.json").read_text())
        return Captured(tensors["x"], tensors.get("y", tensors["x"]), **limits)


def norm_limits(cache: Path, place: SitePlace, sides: Sequence[Tensor]) -> list[float]:
    """Largest ordinary norms of the training tokens' inputs and outputs, which are written to `cache`, too."""
    limits = [MASSIVE * float(side.norm(dim=1).median()) for side in sides]
    (cache / f"{place.name}.json").write_text(json.dumps({"x_limit": limits[0], "y_limit": limits[-1]}))
    return limits


def write(
    cache: Path, place: SitePlace, sizes: Mapping[str, int], sides: Sequence[Tensor], limits: Sequence[float]
) -> None:
    """Divide the ordinary ones of the tokens at random into files of `sizes`.

    Raises:
        ValueError: there are too few.
    """
    ordinary = torch.ones(len(sides[0]), dtype=torch.bool)
    for side, limit in zip(sides, limits, strict=True):
        ordinary &= side.norm(dim=1) <= limit
    index = ordinary.nonzero().squeeze(1)
    rest = len(index) - sum(sizes.values())
    if rest < 0:
        raise ValueError(f"{place.name}: expected ordinary tokens {dict(sizes)}, found {len(index)} of {len(ordinary)}")
    index = index[torch.randperm(len(index), generator=torch.Generator().manual_seed(1))]
    for split, chosen in zip((*sizes, None), index.split([*sizes.values(), rest]), strict=True):
        if split is not None:
            tensors = {"x": sides[0][chosen]} | ({"y": sides[-1][chosen]} if place.site == "mlp" else {})
            save_file(tensors, cache / f"{place.name}-{split}.safetensors")
