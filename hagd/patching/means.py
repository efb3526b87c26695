"""Ablation values of nodes: their means over prompts, by slot."""

from __future__ import annotations

import torch
from torch import Tensor

from hagd.activations.heads import head_outputs
from hagd.models.language_model import LanguageModel
from hagd.patching.patched_model import PatchedModel
from hagd.patching.records import HeadMeans, SlotMeans
from hagd.tasks.records import Prompts
from hagd.transcoders.records import TranscoderSet


def slot_means(lm: LanguageModel, transcoders: TranscoderSet, prompts: Prompts, n_slots: int, batch: int) -> SlotMeans:
    """Means over `prompts` of features and errors, and firing frequencies, by slot."""
    n_layers, m, d = len(transcoders.layers), transcoders.m, lm.d_model
    features = torch.zeros(n_layers, n_slots, m, device=lm.device)
    errors = torch.zeros(n_layers, n_slots, d, device=lm.device)
    fired = torch.zeros(n_layers, n_slots, m, device=lm.device)
    count = torch.zeros(n_slots, device=lm.device)
    probe = PatchedModel(lm, transcoders, SlotMeans(features, errors, fired))
    for start in range(0, len(prompts), batch):
        flat = prompts[start : start + batch].flat()
        f, e = probe.features(flat.tokens)
        keep = flat.slots >= 0
        slots = flat.slots[keep]
        count.index_add_(0, slots, torch.ones_like(slots, dtype=count.dtype))
        features.index_add_(1, slots, f[:, keep])
        errors.index_add_(1, slots, e[:, keep])
        fired.index_add_(1, slots, (f[:, keep] > 0).float())
    per = count.clamp(min=1)[None, :, None]
    return SlotMeans(features / per, errors / per, fired / per)


def head_means(lm: LanguageModel, layers: tuple[int, ...], prompts: Prompts, n_slots: int, batch: int) -> HeadMeans:
    """Means over `prompts` of the outputs of all heads of `layers`, by slot."""
    total: Tensor | None = None
    count = torch.zeros(n_slots, device=lm.device)
    for start in range(0, len(prompts), batch):
        flat = prompts[start : start + batch].flat()
        z = head_outputs(lm, flat.tokens, layers)
        if total is None:
            total = z.new_zeros(len(layers), n_slots, *z.shape[3:])
        keep = flat.slots >= 0
        slots = flat.slots[keep]
        count.index_add_(0, slots, torch.ones_like(slots, dtype=count.dtype))
        total.index_add_(1, slots, z[:, keep])
    assert total is not None
    return HeadMeans(layers, total / count.clamp(min=1)[None, :, None, None])
