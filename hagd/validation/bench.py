"""The validation split under one kind of ablation, with its two reference points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hagd.config.stages import Ablation, ErrorMode, ValidationConfig
from hagd.patching.objective import Objective, Outcome
from hagd.patching.patched_model import PatchedModel
from hagd.search.records import Circuit
from hagd.tasks.records import TaskData
from hagd.validation.measures import Interval, Statistic, bootstrap, faithfulness, preservation


@dataclass(frozen=True)
class Bench:
    """Runs circuits on the validation split under one ablation and error mode.

    Attributes:
        full: the unpatched model.
        empty: everything ablated.
        n_bootstrap, seed: of intervals.
    """

    objective: Objective
    full: Outcome
    empty: Outcome
    n_bootstrap: int
    seed: int

    @classmethod
    def of(
        cls,
        patched: PatchedModel,
        task: TaskData,
        ablation: Ablation,
        error: ErrorMode,
        config: ValidationConfig,
        seed: int,
    ) -> Bench:
        """Measures both reference points."""
        objective = Objective(
            patched, task, task.validation, ablation=ablation, error=error, batch_size=config.batch_size
        )
        empty = objective.outcome(torch.zeros(patched.gate_shape, device=patched.lm.device))
        return cls(objective, objective.full(), empty, config.n_bootstrap, seed)

    @property
    def gate_shape(self) -> tuple[int, ...]:
        """Of the patched model."""
        return self.objective.patched.gate_shape

    def run(self, gates: Tensor) -> Outcome:
        """The patched model with gates in the shape `gate_shape`."""
        return self.objective.outcome(gates.to(self.objective.patched.lm.device))

    def run_circuit(self, circuit: Circuit) -> Outcome:
        """The patched model with a circuit alone."""
        return self.run(circuit.gates(self.gate_shape))

    def preservation(self, outcome: Outcome) -> Interval:
        """φ with its interval."""
        return self.interval(preservation(outcome, self.full))

    def faithfulness(self, outcome: Outcome) -> Interval:
        """F with its interval."""
        return self.interval(faithfulness(outcome, self.full, self.empty))

    def share_of_behaviour(self, difference: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Mean over the prompts `index` of logit differences `[..., N]` in units of F, `[...]`.

        NaN where F is undefined, because the full model and the empty circuit do the same.
        """
        full, empty = (each.logit_difference.double().numpy()[index].mean() for each in (self.full, self.empty))
        return difference[..., index].mean(-1) / (full - empty if full != empty else np.nan)

    def interval(self, statistic: Statistic) -> Interval:
        """Of a statistic of prompt indices."""
        return bootstrap(statistic, len(self.objective), self.n_bootstrap, self.seed)


class Count:
    """Tells a progress display how many of `total` circuits have been measured; called once a circuit."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total)
