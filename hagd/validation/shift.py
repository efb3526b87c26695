"""Whether a circuit holds for other wordings of its task than those that it was found on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from hagd.attribution.records import AttributionGraph
from hagd.config.stages import Ablation, ValidationConfig
from hagd.patching.objective import Outcome
from hagd.patching.patched_model import PatchedModel
from hagd.search.baselines import best_circuit
from hagd.search.records import Circuit
from hagd.tasks.records import Prompts, TaskData
from hagd.validation.bench import Bench, Count
from hagd.validation.measures import of_draws
from hagd.validation.random_circuits import random_matched
from hagd.validation.records import Shift


def measure_shift(
    patched: PatchedModel,
    task: TaskData,
    shifted: Prompts,
    graph: AttributionGraph,
    circuit: Circuit,
    ranking: np.ndarray,
    ablation: Ablation,
    config: ValidationConfig,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Shift:
    """Figures `shift.NAME`, error terms at their mean; ablation values are those of the discovery split, as ever.

    - `n_prompts`, `model_accuracy`, `empty_accuracy`: the prompts, the full model, the empty circuit.
    - `preservation`, `faithfulness`: φ and F of the circuit, with intervals over prompts.
    - `attribution.preservation`, `random.preservation`: of the best nodes of `ranking`, and of random circuits with as
      many nodes in every layer and slot (mean; the interval is the range of 95 % of the draws).

    Args:
        patched: the patched model.
        task: how the prompts are scored; none of its splits is read.
        shifted: prompts of other wordings.
        graph: candidates.
        circuit: the reported circuit.
        ranking: `[n_candidates]`, integrated gradients on the discovery split.
        ablation: value of ablated nodes.
        config: numbers of draws.
        seed: of random circuits and the bootstrap.
        progress: called with circuits measured and to measure.
    """
    bench = Bench.of(patched, replace(task, validation=shifted), ablation, "mean", config, seed)
    count = Count(progress, 2 + config.n_random)

    def measured(circuit: Circuit) -> Outcome:
        count()
        return bench.run_circuit(circuit)

    own = measured(circuit)
    attributed = measured(best_circuit(graph, ranking, len(circuit)))
    drawn = [bench.preservation(measured(each)).value for each in random_matched(graph, circuit, config.n_random, seed)]
    return Shift(
        {
            "shift.n_prompts": float(len(shifted)),
            "shift.model_accuracy": bench.full.accuracy,
            "shift.empty_accuracy": bench.empty.accuracy,
            **bench.preservation(own).named("shift.preservation"),
            **bench.faithfulness(own).named("shift.faithfulness"),
            **bench.preservation(attributed).named("shift.attribution.preservation"),
            **of_draws(drawn).named("shift.random.preservation"),
        }
    )
