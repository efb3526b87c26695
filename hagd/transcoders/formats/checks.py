"""From the layers that a layout holds to a set of dictionaries, and what a layout has no place for.

Shape legend: d = d_model, m dictionary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.records import Transcoder, TranscoderSet

_ROWS = 4096


@dataclass(frozen=True)
class Layer:
    """One layer as read.

    Attributes:
        where: its file or folder, for messages.
        site: what it decomposes.
        model: name of the model that it was trained for; empty where the layout does not say.
        transcoder: the dictionary.
    """

    where: Path
    site: Site
    model: str
    transcoder: Transcoder


def assemble(folder: Path, layers: Sequence[Layer]) -> TranscoderSet:
    """The set of all layers, ascending.

    Raises:
        ArtifactError: values are not finite, k or a threshold is out of range, or two dictionaries are of one layer.
        ConfigError: the dictionaries differ in site, model, size or precision.
    """
    ordered = sorted((_checked(layer) for layer in layers), key=lambda layer: layer.transcoder.layer)
    for first, second in pairwise(ordered):
        if first.transcoder.layer == second.transcoder.layer:
            raise ArtifactError(
                f"{folder}: expected one dictionary a layer, found {first.where.name} and {second.where.name} for "
                f"layer {first.transcoder.layer}; move one of them elsewhere"
            )
        for what, value in _SHARED.items():
            if value(first) != value(second):
                raise ConfigError(
                    f"{folder}: expected dictionaries of one {what}, found {value(first)} in {first.where.name} and "
                    f"{value(second)} in {second.where.name}; keep those that belong together in a folder of their own"
                )
    return TranscoderSet(ordered[0].model, ordered[0].site, tuple(layer.transcoder for layer in ordered))


_SHARED: dict[str, Callable[[Layer], object]] = {
    "site": lambda layer: layer.site,
    "model": lambda layer: layer.model,
    "shape [m, d]": lambda layer: list(layer.transcoder.W_enc.shape),
    "precision": lambda layer: layer.transcoder.W_enc.dtype,
}


def in_precision(found: Transcoder, dtype: torch.dtype) -> Transcoder:
    """All tensors of a dictionary in `dtype`."""
    cast: dict[str, Any] = {name: tensor.to(dtype) for name, tensor in _tensors(found).items() if tensor is not None}
    return replace(found, **cast, W_later=tuple(decoder.to(dtype) for decoder in found.W_later))


def _tensors(found: Transcoder) -> dict[str, Tensor | None]:
    names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold", "W_skip")
    return {name: getattr(found, name) for name in names}


def _checked(layer: Layer) -> Layer:
    """With all tensors in the precision of the encoder: peers keep biases and thresholds in others at times."""
    found = in_precision(layer.transcoder, layer.transcoder.W_enc.dtype)
    m = len(found.W_enc)
    if found.k is not None and not 1 <= found.k <= m:
        raise ArtifactError(f"{layer.where}: expected k from 1 to the dictionary size {m}, found k = {found.k}")
    for name, tensor in (*_tensors(found).items(), *(("W_later", decoder) for decoder in found.W_later)):
        if tensor is not None and not tensor.isfinite().all():
            raise ArtifactError(
                f"{layer.where}: expected finite values, found NaN or infinity in {name}; copy the file again, or "
                "take an earlier checkpoint of its training"
            )
    if found.threshold is not None and bool((found.threshold < 0).any()):
        raise ArtifactError(
            f"{layer.where}: expected thresholds of at least 0, found {float(found.threshold.min()):.3g}; features "
            "below zero have no place in a circuit of active features"
        )
    return replace(layer, transcoder=found)


def refusal(layout: str, found: str, expected: str, fix: str) -> ConfigError:
    """The error for dictionaries that a layout has no place for."""
    return ConfigError(f"export.format={layout}: its layout holds {expected}, found {found}; {fix}")


def image(W: Tensor, v: Tensor) -> Tensor:
    """`W v` `[m]` in double precision, for `W` `[m, d]`, `v` `[d]`; some rows at a time."""
    return torch.cat([rows.double() @ v.double() for rows in W.split(_ROWS)])


def is_relu(threshold: Tensor) -> bool:
    """Whether thresholds `[m]` let everything positive through."""
    return not bool(threshold.any())
