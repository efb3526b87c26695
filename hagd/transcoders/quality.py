"""How well trained dictionaries explain a model, measured on prompts that did not train them.

Shape legend: L layers, B tokens, S slots, d = d_model, m dictionary size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hagd.activations.capture import Site, capture
from hagd.models.language_model import LanguageModel
from hagd.tasks.records import Prompts
from hagd.transcoders.objective import Scaling
from hagd.transcoders.records import LayerQuality, Transcoder
from hagd.transcoders.training import TranscoderTraining


@torch.no_grad()
def measure(
    lm: LanguageModel,
    transcoders: Sequence[Transcoder],
    site: Site,
    module: TranscoderTraining,
    prompts: Prompts,
    n_slots: int,
) -> tuple[LayerQuality, ...]:
    """FVU, L0, dead share and R² of the prediction head per layer, over all positions of `prompts`.

    FVU is `Σ ‖y − ŷ‖² / Σ ‖y − ȳ‖²` with one mean over all tokens; a feature is dead when it fires nowhere here.
    """
    slots = prompts.slots.flatten(0, 1)
    tokens = prompts.tokens.flatten(0, 1)
    layers = [t.layer for t in transcoders]
    x, y = capture(lm, tokens.to(lm.device), site, layers)
    keep = slots >= 0
    slot = slots[keep]
    x, y = x.cpu()[:, keep], y.cpu()[:, keep]
    predicted = _prediction_r2(module, x)
    qualities = []
    for i, transcoder in enumerate(transcoders):
        f = transcoder.encode(x[i])
        error = (y[i] - transcoder.decode(f)).pow(2).sum(-1)
        power = (y[i] - y[i].mean(0)).pow(2).sum(-1)
        by_slot = tuple(_ratio(error[slot == s], power[slot == s]) for s in range(n_slots))
        active = f > 0
        qualities.append(
            LayerQuality(
                layer=transcoder.layer,
                fvu=_ratio(error, power),
                l0=float(active.float().sum(-1).mean()),
                dead=float((~active.any(0)).float().mean()),
                fvu_by_slot=by_slot,
                prediction_r2=predicted[i] if i < len(predicted) else float("nan"),
            )
        )
    return tuple(qualities)


def _ratio(error: Tensor, power: Tensor) -> float:
    return float(error.sum() / power.sum()) if len(power) and power.sum() > 0 else float("nan")


def _prediction_r2(module: TranscoderTraining, x: Tensor) -> list[float]:
    """Explained share of each next layer's features."""
    stacked = module.stacked
    if not stacked.head_map.shape[0]:
        return []
    f = stacked.encode(Scaling(module.x_mean, module.x_scale)(x))
    miss = (f[1:] - stacked.predict(f)).pow(2).sum((1, 2))
    spread = (f[1:] - f[1:].mean(1, keepdim=True)).pow(2).sum((1, 2)).clamp(min=1e-12)
    return (1 - miss / spread).tolist()
