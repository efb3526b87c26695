"""The quality of dictionaries as flat figures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hagd.transcoders.records import TranscoderSet

SCALARS = ("fvu", "l0", "dead", "dense", "near_duplicates", "loss_recovered", "kl", "prediction_r2")
"""Fields of `LayerQuality` with one number a layer."""


def flat_metrics(found: TranscoderSet, slot_names: Sequence[str]) -> dict[str, float]:
    """Figures by name; those that are not defined (NaN) are left out.

    `transcoder.NAME` is the mean over the layers that have the figure, `transcoder.layerI.NAME` a layer's own,
    `transcoder.NAME_all` of all layers spliced in at once; `time.transcoder_*` come from the training.
    """
    by_layer = {name: {each.layer: float(getattr(each, name)) for each in found.quality} for name in SCALARS}
    for quality in found.quality:
        for slot, value in zip(slot_names, quality.fvu_by_slot, strict=True):
            by_layer.setdefault(f"fvu_by_slot.{slot}", {})[quality.layer] = value
    figures: dict[str, float] = {}
    for name, values in by_layer.items():
        defined = [value for value in values.values() if not math.isnan(value)]
        figures[f"transcoder.{name}"] = sum(defined) / len(defined) if defined else math.nan
        figures |= {f"transcoder.layer{layer}.{name}": value for layer, value in values.items()}
    figures |= {
        "transcoder.kl_all": found.kl,
        "transcoder.loss_recovered_all": found.loss_recovered,
        "time.transcoder_tokens_per_second": found.tokens_per_second,
        "time.transcoder_waiting": found.waiting,
    }
    return {name: value for name, value in figures.items() if not math.isnan(value)}
