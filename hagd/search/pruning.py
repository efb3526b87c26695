"""Causal pruning: exchange the nodes that interventions show to be idle against better ones outside.

Each member of a circuit is ablated alone, and each of the best outsiders is added alone; both are measured, not
estimated. The least useful members then make room for the most useful outsiders, as many as lower the loss
(tried at halving numbers). The size never changes, and the loss never rises on the prompts of a round, a sample of the
discovery split that also chose the nodes: on the whole split it can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hagd.config.stages import SearchConfig
from hagd.patching.objective import Objective
from hagd.search.gates import losses_of
from hagd.search.records import SearchResult

_OUTSIDERS = 1  # outsiders tried, in units of the circuit's size


@dataclass(frozen=True)
class Exchange:
    """The circuit afterwards, `[n]` indices of candidates, and how many nodes were exchanged."""

    members: np.ndarray
    exchanged: int


def exchange_idle(
    objective: Objective,
    flat: Tensor,
    members: np.ndarray,
    ranking: np.ndarray,
    *,
    budget: float,
    prompts: int,
    generator: torch.Generator,
) -> Exchange:
    """Improve a circuit at its size within `budget` model evaluations.

    Args:
        objective: the discovery split.
        flat: int64 `[n_candidates]`, positions of the candidates in the flattened gates.
        members: indices of candidates in the circuit.
        ranking: candidates from best to worst; the order in which outsiders are tried.
        budget: model evaluations, in units of the whole discovery split.
        prompts: prompts a test.
        generator: of the prompt samples.
    """
    spent, exchanged = 0.0, 0
    members = members.copy()
    while True:
        index = objective.sample(prompts, generator)
        share = len(index) / len(objective)
        inside = np.zeros(len(flat), dtype=bool)
        inside[members] = True
        outsiders = ranking[~inside[ranking]][: _OUTSIDERS * len(members)]
        trials = _trials(len(members), len(outsiders))
        cost = share * (len(members) + len(outsiders) + len(trials) + 1)
        if not trials or spent + cost > budget:
            return Exchange(members, exchanged)
        spent += cost
        flips = np.concatenate([members, outsiders])
        effect = losses_of(objective, flat, _flip_each(inside, flips), index)
        worst = members[np.argsort(effect[: len(members)])]
        best = outsiders[np.argsort(effect[len(members) :])]
        tried = [inside] + [_swap(inside, worst[:n], best[:n]) for n in trials]
        results = losses_of(objective, flat, np.stack(tried), index)
        winner = int(results.argmin())
        if winner == 0:
            return Exchange(members, exchanged)
        members = np.flatnonzero(tried[winner])
        exchanged += trials[winner - 1]


def budgets_of(sizes: Sequence[int], size: int, budget: float) -> dict[int, float]:
    """Size → evaluations, the reported size first: half for it, the rest shared evenly among the smaller ones."""
    smaller = [each for each in sorted(sizes, reverse=True) if each < size]
    budgets = {size: budget / 2 if smaller else float(budget)}
    return budgets | {each: budget / 2 / len(smaller) for each in smaller}


def not_pruned(result: SearchResult, config: SearchConfig, n_candidates: int, n_discovery: int) -> str | None:
    """Why causal pruning did not touch the reported circuit, where its budget is below the cost of one round."""
    n_outsiders = min(_OUTSIDERS * result.size, n_candidates - result.size)
    trials = _trials(result.size, n_outsiders)
    if config.method != "hagd" or not config.pruning or config.pruning_budget <= 0 or not trials:
        return None
    cost = min(config.pruning_prompts / n_discovery, 1) * (result.size + n_outsiders + len(trials) + 1)
    budget = budgets_of([len(each) for each in result.circuits], result.size, config.pruning_budget)[result.size]
    if cost <= budget:
        return None
    return (
        f"causal pruning: one round for {result.size} nodes costs {math.ceil(cost)} evaluations, search.pruning_budget="
        f"{config.pruning_budget} leaves {budget:g} for the reported circuit: not pruned; set search.pruning_budget to "
        f"at least {math.ceil(cost * config.pruning_budget / budget)}"
    )


def _trials(n_members: int, n_outsiders: int) -> list[int]:
    """How many nodes a round tries to exchange at once: a quarter of those that can be, half of that, …, 1."""
    n = min(n_members, n_outsiders) // 4
    return [n >> i for i in range(n.bit_length())]


def _flip_each(inside: np.ndarray, flips: np.ndarray) -> np.ndarray:
    rows = np.repeat(inside[None], len(flips), axis=0)
    rows[np.arange(len(flips)), flips] ^= True
    return rows


def _swap(inside: np.ndarray, leave: np.ndarray, enter: np.ndarray) -> np.ndarray:
    swapped = inside.copy()
    swapped[leave], swapped[enter] = False, True
    return swapped
