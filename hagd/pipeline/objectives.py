"""What circuits of a run are judged by: the objective on one split, with the configured ablation and error mode."""

from __future__ import annotations

from hagd.config.run import StagesConfig
from hagd.config.stages import SearchLoss
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData


def discovery_objective(config: StagesConfig, patched: PatchedModel, task: TaskData) -> Objective:
    """The objective of attribution and search."""
    return objective_on(config, patched, task, task.discovery)


def objective_on(
    config: StagesConfig,
    patched: PatchedModel,
    task: TaskData,
    prompts: Prompts,
    loss: SearchLoss = "divergence",
) -> Objective:
    """An objective with the configured ablation and error mode."""
    graph = config.graph
    return Objective(
        patched,
        task,
        prompts,
        ablation=graph.ablation,
        error=graph.error,
        batch_size=graph.batch_size,
        loss=loss,
    )
