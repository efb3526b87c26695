"""What edges from and into heads need beside the linear model: how far a head is from its ablation value, and the
direction in which its output is read.

A head is a vector. As a source it moves by `z − v`. As a target it is read along the metric's gradient at its output,
`u = ∂metric/∂z` in the clean run of the full model, nothing frozen, in each prompt and position: the edge i → head is
what i adds to `u · z`, with u a constant. So incoming edges add up to `u · (z − z′)`, with z′ the output when every
source is ablated and patterns stay as they are.

Shape legend: B sequences, T positions, H heads, e width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hagd.activations.heads import rewritten_heads
from hagd.config.stages import Ablation, Metric
from hagd.models.language_model import LanguageModel
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.scoring import SCORES


def head_deviations(patched: PatchedModel, prompts: Prompts, ablation: Ablation) -> dict[int, Tensor]:
    """Layer → `z − v` `[B, T, H, e]` of the heads that are nodes; empty without them."""
    ablated = patched.ablated_heads(prompts.counterfactual.flatten(0, 1), prompts.slots.flatten(0, 1), ablation)
    if ablated is None:
        return {}
    clean = patched.heads(prompts.tokens.flatten(0, 1))
    return dict(zip(patched.layout.head_layers, clean - ablated, strict=True))


def head_directions(patched: PatchedModel, task: TaskData, prompts: Prompts, metric: Metric) -> dict[int, Tensor]:
    """Layer → `u` `[B, T, H, e]`, gradient of the metric at the heads that are nodes; empty without them."""

    def measured() -> Tensor:
        logits = patched.lm.logits_at(prompts.tokens.flatten(0, 1), prompts.scored.flatten(0, 1))
        logits = logits.unflatten(0, prompts.tokens.shape[:2])
        return SCORES[metric](logits, prompts, task.length_normalised).sum()

    return gradients_at_heads(patched.lm, patched.layout.head_layers, measured)


def gradients_at_heads(lm: LanguageModel, layers: Sequence[int], metric: Callable[[], Tensor]) -> dict[int, Tensor]:
    """Layer → gradient `[B, T, H, e]`, at its heads' outputs, of the number that `metric` gets from running `lm`."""
    if not layers:
        return {}
    leaves: list[Tensor] = []

    def add_leaf(_: int, z: Tensor) -> Tensor:
        leaves.append(torch.zeros_like(z, requires_grad=True))
        return z + leaves[-1]

    with rewritten_heads(lm, layers, add_leaf), torch.enable_grad():
        value = metric()
    gradients = torch.autograd.grad(value, leaves)
    return {
        layer: u.to(torch.promote_types(u.dtype, torch.float32)) for layer, u in zip(layers, gradients, strict=True)
    }
