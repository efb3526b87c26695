"""Completeness: whether circuit and model fail alike without parts of the circuit (Wang et al., arXiv 2211.00593)."""

from __future__ import annotations

import numpy as np
import torch

from hagd.attribution.records import AttributionGraph
from hagd.search.records import Circuit
from hagd.validation.bench import Bench, Count
from hagd.validation.measures import Interval
from hagd.validation.random_circuits import random_matched


def completeness_metrics(
    bench: Bench, graph: AttributionGraph, circuit: Circuit, n: int, seed: int, count: Count
) -> dict[str, float]:
    """Incompleteness: mean of |F(C∖K) − F(M∖K)| over `n` random subsets K of the circuit C, M the model; 0 is best.

    Every node is in K with probability ½. `control.random.incompleteness` is the same of random circuits, a new one for
    every K, with as many nodes in every layer and slot. Intervals are over prompts; no figures where `n` is 0.
    """
    if not n:
        return {}
    rng = np.random.default_rng(seed)
    others = random_matched(graph, circuit, n, seed)
    return {
        **incompleteness(bench, [circuit] * n, rng, count).named("validation.incompleteness"),
        **incompleteness(bench, others, rng, count).named("control.random.incompleteness"),
    }


def incompleteness(bench: Bench, circuits: list[Circuit], rng: np.random.Generator, count: Count) -> Interval:
    """Mean of |F(C∖K) − F(M∖K)| over the circuits C, one random subset K of each."""
    everything = torch.ones(bench.gate_shape)
    gaps = []
    for circuit in circuits:
        removed = Circuit(circuit.nodes[rng.random(len(circuit)) < 0.5]).gates(bench.gate_shape)
        differences = []
        for start in (circuit.gates(bench.gate_shape), everything):
            count()
            differences.append(bench.run(start - removed).logit_difference.double())
        gaps.append((differences[0] - differences[1]).numpy())
    gap = np.stack(gaps)
    return bench.interval(lambda index: float(np.abs(bench.share_of_behaviour(gap, index)).mean()))
