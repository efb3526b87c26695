"""Differentiable refinement: hard-concrete gates on nodes under a price that follows a schedule of sizes.

Gates are those of Louizos et al. (2018): `g = clamp(σ((log u − log(1 − u) + z)/β)(ζ − γ) + γ, 0, 1)`, u uniform. The
loss is that of the objective + λ · E[number of open gates]. λ is not a hyperparameter: it rises while more gates are
open than the schedule wants and falls otherwise, and the schedule descends through all requested sizes, so one run
gives a circuit trained for each size (a ranking trained at one price is poor far below its own size).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from hagd.patching.objective import Objective

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
_OPEN_SHIFT = BETA * math.log(-GAMMA / ZETA)
_PRICE_RATE = 3e-3
_HOLD = 0.5  # share of a size's steps at that size, the rest descends towards it


def descend(
    objective: Objective,
    flat: Tensor,
    start: Tensor,
    sizes: Sequence[int],
    *,
    steps: int,
    learning_rate: float,
    batch: int,
    generator: torch.Generator,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, Tensor]:
    """Gate logits `[n]` trained for each size, from large to small.

    Args:
        objective: the discovery split.
        flat: int64 `[n]`, the candidates' positions in the flattened gates; every other gate is 0.
        start: `[n]`, initial logits.
        sizes: wanted sizes, all below n; nothing is trained for none.
        steps: gradient steps in all, shared evenly by the sizes.
        learning_rate: of Adam.
        batch: prompts a step.
        generator: of the noise and the batches.
        progress: called with steps done and to do.
    """
    device = objective.patched.lm.device
    logits = start.clone().to(device).requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=learning_rate)
    flat = flat.to(device)
    found: dict[int, Tensor] = {}
    price, current, done = 0.0, float(expected_open(logits.detach())), 0
    order = sorted(set(sizes), reverse=True)
    if not order:
        return found
    share = [steps // len(order) + (i < steps % len(order)) for i in range(len(order))]
    for size, n_steps in zip(order, share, strict=True):
        for step in range(n_steps):
            along = min(1.0, (step + 1) / max((1 - _HOLD) * n_steps, 1))
            wanted = current * (size / current) ** along
            index = objective.sample(batch, generator)
            gates = scatter(hard_concrete(logits, generator), flat, objective.patched.gate_shape)
            n_open = expected_open(logits)
            price = max(0.0, price + _PRICE_RATE * math.log(float(n_open.detach()) / wanted))
            optimiser.zero_grad()
            gates.backward(_gradient(objective, gates, index))
            (price * n_open).backward()
            optimiser.step()
            done += 1
            if progress is not None:
                progress(done, steps)
        current = float(size)
        found[size] = logits.detach().cpu().clone()
    return found


def _gradient(objective: Objective, gates: Tensor, index: Tensor) -> Tensor:
    """Of the mean loss over the prompts `index` at `gates`, as many prompts at a time as the objective runs."""
    at = gates.detach().requires_grad_()
    total = torch.zeros_like(gates)
    for part in index.split(objective.batch_size):
        total += torch.autograd.grad(objective.loss_by_prompt(at, part).sum() / len(index), at)[0]
    return total


def hard_concrete(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One sample of the gates, differentiable in `logits`."""
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-6, 1 - 1e-6).to(logits.device)
    noise = uniform.log() - (1 - uniform).log()
    return (torch.sigmoid((noise + logits) / BETA) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def expected_open(logits: Tensor) -> Tensor:
    """Expected number of gates that are not exactly 0."""
    return torch.sigmoid(logits - _OPEN_SHIFT).sum()


def scatter(values: Tensor, flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    """`values` `[n]` at positions `flat` of otherwise closed gates of `shape`."""
    closed = torch.zeros(math.prod(shape), device=values.device, dtype=values.dtype)
    return closed.index_put((flat,), values).view(shape)


def losses_of(objective: Objective, flat: Tensor, kept: np.ndarray, index: Tensor) -> np.ndarray:
    """Mean loss `[G]` over the prompts `index` of keeping the candidates `kept`, bool `[G, n]`.

    Gates of all nodes are made for a few passes at a time: those of all G would not fit into memory.
    """
    device = objective.patched.lm.device
    at_once = max(1, 4 * objective.batch_size // len(index))
    values = []
    for start in range(0, len(kept), at_once):
        part = torch.as_tensor(kept[start : start + at_once], dtype=torch.float32, device=device)
        gates = torch.stack([scatter(row, flat.to(device), objective.patched.gate_shape) for row in part])
        values.append(objective.losses(gates, index))
    return torch.cat(values).cpu().numpy()
