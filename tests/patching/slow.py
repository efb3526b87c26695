"""The patched model once more: one feature, head and position at a time."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from hagd.config.stages import Ablation, ErrorMode
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts
from tests.reference import (
    HeadAttention,
    encode,
    features_of,
    heads_of,
    run,
    skipped,
    written_features,
)


def at_scored(logits: Tensor, prompts: Prompts) -> Tensor:
    """Of `[N·C, T, V]`, those at the scored positions, `[N, C, A, V]`, zero where nothing is scored."""
    n, c, a = prompts.scored.shape
    out = torch.zeros(n, c, a, logits.shape[-1])
    for row, option, i in product(range(n), range(c), range(a)):
        if prompts.scored[row, option, i] != PADDING:
            out[row, option, i] = logits[row * c + option, prompts.scored[row, option, i]]
    return out


def used(logits: Tensor, prompts: Prompts) -> Tensor:
    return logits.masked_fill((prompts.scored == PADDING)[..., None], 0)


def slow_logits(
    patched: PatchedModel,
    prompts: Prompts,
    gates: Tensor,
    ablation: Ablation,
    error: ErrorMode,
    head_gates: Tensor | None = None,
) -> Tensor:
    """Feature by feature, head by head, position by position; gates `[L, S, m]`, and `[K, S, H]` of heads."""
    lm, transcoders, means = patched.lm, patched.transcoders, patched.means
    tokens, slots = prompts.tokens.flatten(0, 1), prompts.slots.flatten(0, 1)
    clean_errors = features_of(lm, transcoders, tokens)[1]
    counterfactual = features_of(lm, transcoders, prompts.counterfactual.flatten(0, 1))[0]
    features: list[Tensor] = []

    def rewrite(layer: int, read: Tensor, written: Tensor) -> Tensor:
        if layer not in transcoders.layers:
            return written
        i = transcoders.layers.index(layer)
        transcoder = transcoders.transcoders[i]
        features.append(encode(transcoder, read))
        error_term = torch.zeros_like(written)
        for b, t in product(range(tokens.shape[0]), range(tokens.shape[1])):
            slot = int(slots[b, t])
            if slot == PADDING:
                continue  # nothing later reads it: models are causal and padding is on the right
            error_term[b, t] = clean_errors[i, b, t] if error == "keep" else means.errors[i, slot]
            for j in range(transcoders.m):
                v = {"mean": means.features[i, slot, j], "zero": 0.0, "resample": counterfactual[i, b, t, j]}[ablation]
                features[i][b, t, j] = gates[i, slot, j] * features[i][b, t, j] + (1 - gates[i, slot, j]) * v
        return written_features(transcoders, i, features) + skipped(transcoder, read) + transcoder.b_dec + error_term

    attention = None if head_gates is None else _slow_heads(patched, prompts, head_gates, ablation)
    if transcoders.site == "mlp":
        return at_scored(run(lm, tokens, write=rewrite, attention=attention).logits, prompts)
    return at_scored(run(lm, tokens, write_resid=rewrite, attention=attention).logits, prompts)


def _slow_heads(patched: PatchedModel, prompts: Prompts, gates: Tensor, ablation: Ablation) -> HeadAttention:
    lm, layers, slots = patched.lm, patched.layout.head_layers, prompts.slots.flatten(0, 1)
    clean = heads_of(lm, prompts.tokens.flatten(0, 1), layers)
    counterfactual = heads_of(lm, prompts.counterfactual.flatten(0, 1), layers)

    def rewrite(layer: int, z: Tensor) -> Tensor:
        if layer not in layers:
            return z
        i, out = layers.index(layer), torch.zeros_like(z)
        for b, t, h in product(*map(range, z.shape[:3])):
            slot = int(slots[b, t])
            if slot != PADDING:
                mean = clean[i][slots == slot][:, h].mean(0)
                v = {"mean": mean, "zero": torch.zeros_like(mean), "resample": counterfactual[i, b, t, h]}[ablation]
                out[b, t, h] = gates[i, slot, h] * z[b, t, h] + (1 - gates[i, slot, h]) * v
        return out

    return HeadAttention(lm, rewrite)
