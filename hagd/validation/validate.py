"""Causal validation of circuits on prompts that nothing before has read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from hagd.attribution.records import AttributionGraph
from hagd.config.stages import Ablation, ErrorMode, ValidationConfig
from hagd.patching.objective import Outcome
from hagd.patching.patched_model import PatchedModel
from hagd.search.baselines import best_circuit
from hagd.search.records import Circuit, SearchResult
from hagd.tasks.records import TaskData
from hagd.validation.bench import Bench, Count
from hagd.validation.completeness import completeness_metrics
from hagd.validation.measures import (
    Interval,
    area_linear,
    area_log,
    distance_linear,
    faithfulness,
    of_draws,
    preservation,
)
from hagd.validation.minimality import minimality_metrics
from hagd.validation.random_circuits import random_matched
from hagd.validation.records import CurvePoints, Validation

Progress = Callable[[int, int], None]


def validate(
    patched: PatchedModel,
    task: TaskData,
    graph: AttributionGraph,
    result: SearchResult,
    controls: dict[str, np.ndarray],
    grid: Sequence[int],
    ablation: Ablation,
    config: ValidationConfig,
    seed: int,
    progress: Progress | None = None,
) -> Validation:
    """Headline figures, controls at the same size, and curves over all sizes.

    Args:
        patched: the patched model.
        task: its validation split is read here and nowhere else.
        graph: candidates, for the random controls.
        result: the circuits.
        controls: method → ranking `[n_candidates]` of the candidates, made on the discovery split.
        grid: sizes over which areas are taken, up to all candidates; that of the reported circuit must not move them.
        ablation: value of ablated nodes, as in the search; an intervention that it did not use is measured besides:
            `resample`, or `mean` where the search resampled.
        config: numbers of draws.
        seed: of random circuits and the bootstrap.
        progress: called with circuits measured and to measure, at most.
    """
    shape = patched.gate_shape

    def bench(kind: Ablation, error: ErrorMode) -> Bench:
        return Bench.of(patched, task, kind, error, config, seed)

    strict, lenient = bench(ablation, "mean"), bench(ablation, "keep")
    unseen: Ablation = "mean" if ablation == "resample" else "resample"
    other = bench(unseen, "mean")
    gates = result.circuit.gates(shape)
    alone, with_errors = strict.run(gates), lenient.run(gates)
    metrics = _reference_metrics(strict, lenient)
    metrics |= strict.preservation(alone).named("validation.preservation")
    metrics |= lenient.preservation(with_errors).named("validation.preservation_lenient")
    metrics |= other.preservation(other.run(gates)).named(f"validation.preservation_{unseen}")
    metrics |= strict.faithfulness(alone).named("validation.faithfulness")
    metrics |= lenient.faithfulness(with_errors).named("validation.sufficiency")
    complement = lenient.faithfulness(lenient.run(torch.ones(shape) - gates))
    metrics |= Interval(1 - complement.value, 1 - complement.high, 1 - complement.low).named("validation.necessity")
    metrics["validation.n_prompts"] = float(len(task.validation))
    metrics[f"empty.{unseen}_accuracy"] = other.empty.accuracy
    n_sizes, n_removed = len(result.circuits), min(config.n_removed, result.size)
    count = Count(progress, n_sizes * (1 + len(controls) + config.n_random) + 2 * n_removed + 4 * config.n_subsets)
    curves = _curves(strict, graph, result, controls, config, seed, count)
    metrics |= _control_metrics(curves, result.size)
    metrics |= minimality_metrics(strict, graph, result.circuit, config.n_removed, seed, count)
    metrics |= completeness_metrics(lenient, graph, result.circuit, config.n_subsets, seed, count)
    return Validation(metrics | _areas(curves, grid, strict, graph), curves)


def _reference_metrics(strict: Bench, lenient: Bench) -> dict[str, float]:
    objective = strict.objective
    shape = objective.patched.gate_shape
    spliced = strict.run(torch.ones(shape))
    # All features against none, both with errors at their means: what the dictionaries hold of the behaviour.
    ends = torch.stack([torch.ones(shape), torch.zeros(shape)]).to(objective.patched.lm.device)
    all_kept, all_ablated = objective.divergences(ends, torch.arange(len(objective))).tolist()
    return {
        "model.accuracy": strict.full.accuracy,
        "model.logit_difference": float(strict.full.logit_difference.mean()),
        "empty.accuracy": strict.empty.accuracy,
        "empty.lenient_accuracy": lenient.empty.accuracy,
        "empty.logit_difference": float(strict.empty.logit_difference.mean()),
        "transcoder.spliced_accuracy": spliced.accuracy,
        "transcoder.spliced_kl_recovered": 1 - all_kept / all_ablated if all_ablated > 0 else float("nan"),
    }


def _curves(
    bench: Bench,
    graph: AttributionGraph,
    result: SearchResult,
    controls: dict[str, np.ndarray],
    config: ValidationConfig,
    seed: int,
    count: Count,
) -> tuple[CurvePoints, ...]:
    sizes = [len(circuit) for circuit in result.circuits]

    def measured(circuit: Circuit) -> Outcome:
        count()
        return bench.run_circuit(circuit)

    curves = [_curve("circuit", sizes, [[measured(circuit)] for circuit in result.circuits], bench)]
    for name, ranking in controls.items():
        outcomes = [[measured(best_circuit(graph, ranking, size))] for size in sizes]
        curves.append(_curve(name, sizes, outcomes, bench))
    draws = [
        [measured(each) for each in random_matched(graph, circuit, config.n_random, seed)]
        for circuit in result.circuits
    ]
    curves.append(_curve("random", sizes, draws, bench))
    return tuple(curves)


def _curve(method: str, sizes: Sequence[int], draws: Sequence[Sequence[Outcome]], bench: Bench) -> CurvePoints:
    """Means over draws; the interval is over prompts for one draw, over draws for several."""
    kept, faithful, lows, highs = [], [], [], []
    everything = np.arange(len(bench.objective))
    for outcomes in draws:
        values = [preservation(outcome, bench.full)(everything) for outcome in outcomes]
        faithful.append(float(np.mean([faithfulness(o, bench.full, bench.empty)(everything) for o in outcomes])))
        kept.append(float(np.mean(values)))
        if len(outcomes) == 1:
            _, low, high = bench.preservation(outcomes[0])
        else:
            _, low, high = of_draws(values)
        lows.append(low)
        highs.append(high)
    return CurvePoints(method, tuple(sizes), tuple(faithful), tuple(kept), tuple(lows), tuple(highs))


def _control_metrics(curves: Sequence[CurvePoints], size: int) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for curve in curves[1:]:
        at = curve.sizes.index(size)
        interval = Interval(curve.preservation[at], curve.low[at], curve.high[at])
        metrics |= interval.named(f"control.{curve.method}.preservation")
        metrics[f"control.{curve.method}.faithfulness"] = curve.faithfulness[at]
    return metrics


def _areas(
    curves: Sequence[CurvePoints], grid: Sequence[int], bench: Bench, graph: AttributionGraph
) -> dict[str, float]:
    """Of F over the sizes of the grid and all candidates, where every method has the same circuit."""
    n = graph.n_candidates
    everything = bench.run_circuit(Circuit(np.sort(graph.flat)))
    whole = faithfulness(everything, bench.full, bench.empty)(np.arange(len(bench.objective)))
    metrics: dict[str, float] = {}
    for curve in curves:
        at = dict(zip(curve.sizes, curve.faithfulness, strict=True))
        sizes = [size for size in curve.sizes if size in grid and size < n]
        sizes, values = [*sizes, n], [*(at[size] for size in sizes), whole]
        if curve is not curves[0]:
            metrics[f"control.{curve.method}.cpr_log"] = area_log(sizes, values)
            continue
        metrics["curve.cpr_log"] = area_log(sizes, values)
        metrics["curve.cpr"] = area_linear(sizes, values, n)
        metrics["curve.cmd"] = distance_linear(sizes, values, n)
    return metrics
