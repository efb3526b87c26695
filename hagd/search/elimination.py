"""Elimination: circuits of every size by dropping, round by round, the nodes that contribute least to those left.

What a node contributes depends on what else is there, so attributions of the whole model mislead far below its size.
Each round attributes anew, within the circuit that is left: the path integral of the loss over gates from nothing to
that circuit, prompt by prompt. A node counts with its mean over prompts of what it contributes where it helps: a signed
mean would let prompts on which it helps and hurts cancel (as they do in parity), an absolute one would keep
nodes that only hurt. The number of rounds grows with the logarithm of the number of nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hagd.patching.objective import Objective

_AT_ONCE = 2**27
"""Entries of the gates of all prompts of a pass."""


def eliminate(
    objective: Objective,
    flat: Tensor,
    start: np.ndarray,
    sizes: Sequence[int],
    *,
    n_start: int,
    keep: float,
    steps: int,
    prompts: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """A ranking `[n]` of the candidates, larger left later; its first nodes are the circuit of any size.

    Args:
        objective: the discovery split.
        flat: int64 `[n]`, positions of the candidates in the flattened gates.
        start: `[n]`, a first ranking, larger is better.
        sizes: wanted sizes; no round passes over one of them.
        n_start: nodes of the first ranking with which the first round begins.
        keep: share of the nodes that a round keeps.
        steps: points of the path integral.
        prompts: prompts a round.
        generator: of the samples of prompts.
        progress: called with rounds done and to do.
    """
    order = np.argsort(start, kind="stable")
    dropped, left = [order[: len(order) - n_start]], order[len(order) - n_start :]
    rounds = _schedule(n_start, sizes, keep)
    for done, size in enumerate(rounds):
        index = objective.sample(prompts, generator)
        found = contributions(objective, flat[torch.as_tensor(left)], index, steps)
        left = left[np.argsort(found, kind="stable")]
        dropped.append(left[: len(left) - size])
        left = left[len(left) - size :]
        if progress is not None:
            progress(done + 1, len(rounds))
    score = np.empty(len(flat))
    score[np.concatenate([*dropped, left])] = np.arange(len(flat))
    return score


def contributions(objective: Objective, flat: Tensor, index: Tensor, steps: int) -> np.ndarray:
    """Mean over the prompts `index` of what each node of a circuit contributes where it helps, `[n]`.

    With gates α on the circuit and 0 elsewhere, `c_ti = −∫₀¹ ∂loss_t/∂g_i dα`, by the midpoint rule; returned is
    `mean_t max(c_ti, 0)`.

    Args:
        objective: its loss is attributed.
        flat: int64 `[n]`, the circuit's positions in the flattened gates.
        index: prompts.
        steps: points of the integral.
    """
    shape = objective.patched.gate_shape
    device = objective.patched.lm.device
    flat = flat.to(device)
    total = torch.zeros(len(flat), device=device)
    at_once = max(1, min(objective.batch_size, _AT_ONCE // math.prod(shape)))
    for part in index.split(at_once):
        owner = torch.arange(len(part), device=device)
        found = torch.zeros(len(part), len(flat), device=device)
        for step in range(steps):
            values = torch.full_like(found, (step + 0.5) / steps).requires_grad_()
            gates = torch.zeros(len(part), math.prod(shape), device=device)
            gates = gates.index_put((owner[:, None], flat[None]), values).view(len(part), *shape)
            (gradient,) = torch.autograd.grad(objective.loss_by_prompt(gates, part, owner).sum(), values)
            found -= gradient / steps
        total += found.clamp(min=0).sum(0)
    return (total / len(index)).double().cpu().numpy()


def _schedule(n: int, sizes: Sequence[int], keep: float) -> list[int]:
    """Sizes after each round: the smallest of `sizes` last, none of them left out."""
    found: list[int] = []
    stops = sorted(size for size in sizes if size < n)
    while stops and n > stops[0]:
        below = max(stop for stop in stops if stop < n)
        n = max(below, min(int(n * keep), n - 1))
        found.append(n)
    return found
