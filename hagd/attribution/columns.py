"""What direct and total edges have in common: the columns of an attribution matrix for one batch of prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from hagd.attribution.heads import head_directions
from hagd.attribution.records import Nodes
from hagd.config.stages import Ablation, Metric
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.scoring import SCORES


class EdgeColumns(ABC):
    """Runs the model on the prompts once; then each column is a backward pass."""

    def __init__(
        self,
        patched: PatchedModel,
        task: TaskData,
        prompts: Prompts,
        nodes: Nodes,
        ablation: Ablation,
        metric: Metric = "logit_difference",
    ) -> None:
        self.patched = patched
        self.nodes = nodes
        self.n_prompts = len(prompts)
        self.slots = prompts.slots.flatten(0, 1)
        self._directions = head_directions(patched, task, prompts, metric)
        logits = self._run(prompts, ablation).unflatten(0, prompts.tokens.shape[:2])
        self._metric = SCORES[metric](logits, prompts, task.length_normalised).sum()

    @abstractmethod
    def _run(self, prompts: Prompts, ablation: Ablation) -> Tensor:
        """Prepare for columns; logits `[B, A, V]` at the scored positions."""

    @abstractmethod
    def column(self, target: int) -> tuple[Tensor, Tensor]:
        """Sources and edges into node `target`: indices `[s]`, effects `[s]` averaged over the prompts."""
