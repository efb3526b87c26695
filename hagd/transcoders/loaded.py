"""What dictionaries are by their weights, and what of the configuration they make true."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from hagd.config.run import StagesConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.records import Transcoder, TranscoderSet

HELD = ("k", "expansion", "activation", "cross_layer", "skip")
"""Keys of `transcoder` whose values files of dictionaries hold."""

_READ = ("path", "site", "layers", "fvu_warning")
"""Keys of `transcoder` that are read where the dictionaries are from elsewhere."""


def held(found: TranscoderSet) -> dict[str, Any]:
    """Layers, m and the values of `HELD`; a list, one a layer, where layers differ.

    k is None where thresholds decide. Thresholds of 0 are called relu, one threshold for all features batch_topk,
    others jumprelu.
    """
    return _held(found.transcoders)


def _held(found: Sequence[Transcoder]) -> dict[str, Any]:
    return {
        "layers": [each.layer for each in found],
        "m": _common(found, lambda each: len(each.W_enc)),
        "k": _common(found, lambda each: each.k),
        "expansion": _common(found, lambda each: _ratio(*each.W_enc.shape)),
        "activation": _common(found, lambda each: _activations(each)[0]),
        "cross_layer": any(each.W_later for each in found),
        "skip": _common(found, lambda each: each.W_skip is not None),
    }


def contradictions(found: Sequence[Transcoder], options: TranscoderConfig) -> list[str]:
    """A phrase for each key of `HELD` that is not at its default and is not what the dictionaries are."""
    values = _held(found)
    fits = {name: values[name] == getattr(options, name) for name in HELD}
    fits["k"] = all(each.k in (None, options.k) for each in found)  # where thresholds decide there is none
    fits["activation"] = all(options.activation in _activations(each) for each in found)
    fits["cross_layer"] |= len(found) == 1
    problems = []
    for name in HELD:
        chosen, default = getattr(options, name), TranscoderConfig.model_fields[name].default
        if chosen != default and not fits[name]:
            problems.append(f"transcoder.{name}={values[name]}, found {chosen} (default {default})")
    return problems


def shown_config(config: StagesConfig, found: TranscoderSet | None) -> dict[str, Any]:
    """The configuration as plain values; with `transcoder.path` only the settings of dictionaries that are read.

    Args:
        config: the whole configuration.
        found: the dictionaries, whose values stand in for those that are not read; None: not loaded yet.
    """
    values = config.model_dump(mode="json")
    if config.transcoder.path is not None:
        read = {name: values["transcoder"][name] for name in _READ}
        values["transcoder"] = read if found is None else {**read, **held(found)}
    return values


def _common(found: Sequence[Transcoder], of: Callable[[Transcoder], Any]) -> Any:
    values = [of(each) for each in found]
    return values[0] if all(value == values[0] for value in values) else values


def _ratio(m: int, d: int) -> float:
    return m // d if m % d == 0 else m / d


def _activations(transcoder: Transcoder) -> tuple[str, ...]:
    """Those that the weights may be of, the most likely first."""
    threshold: Tensor | None = transcoder.threshold
    if threshold is None:
        return ("topk",)
    if not threshold.any():
        return ("relu", "jumprelu", "batch_topk")
    return ("batch_topk", "jumprelu") if (threshold == threshold[0]).all() else ("jumprelu",)
