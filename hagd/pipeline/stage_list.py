"""The list of stages: what each one reads, which part of the configuration decides it, what it computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hagd.artifacts.keys import stage_key
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import AttributionGraph
from hagd.hierarchy.partition import build_prompt_hierarchy
from hagd.hierarchy.records import Hierarchy
from hagd.models.records import TrainedLM
from hagd.patching.records import HeadMeans, SlotMeans
from hagd.pipeline import decided_by, measurements, prompt_stages, stages
from hagd.pipeline.objectives import discovery_objective
from hagd.pipeline.progress import StageProgress
from hagd.report.assemble import Extraction, assemble
from hagd.report.prompt.records import PromptReport
from hagd.report.records import ReportData
from hagd.search.records import SearchResult
from hagd.tasks.records import TaskData
from hagd.transcoders.records import TranscoderSet
from hagd.validation.records import Comparison, DarkMatter, Shift, Validation

if TYPE_CHECKING:
    from hagd.pipeline.pipeline import Pipeline


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        record: class of the result.
        version: raised whenever the stage's code gives other results for the same inputs, beyond rounding.
        parents: stages whose results it reads.
        config: the part of the configuration that decides the result.
        compute: called with the pipeline, the scratch folder and a progress reporter.
        trains: whether it trains with Lightning, which all processes of a job do together.
    """

    record: type[Any]
    version: int
    parents: tuple[str, ...]
    config: Callable[[Pipeline], dict[str, Any]]
    compute: Callable[[Pipeline, Path, StageProgress], Any]
    trains: bool = False


def _activations_folder(p: Pipeline, work: Path) -> Path:
    """Scratch, or with `transcoder.activations.keep` one for all trainings on the same activations."""
    if not p.config.transcoder.activations.keep:
        return work
    config = {key: value for key, value in decided_by.of_transcoders(p).items() if key in decided_by.ACTIVATIONS}
    parents = {parent: p.key(parent) for parent in p.parents("transcoders")}
    return p.runs / "activations" / stage_key("activations", 1, config, parents, p.config.seed)


def _build_task(p: Pipeline, _: Path, __: StageProgress) -> TaskData:
    """With the tokenizer alone: what is wrong with a task or its data is said before the weights are read."""
    from hagd.tasks.build import build_task

    return build_task(p.config.task, p.tokenizer, p.config.seed)


def _extraction(p: Pipeline) -> Extraction:
    return Extraction(
        config=p.config,
        patched=p.patched,
        discovery=discovery_objective(p.config, p.patched, p.get("prompts")),
        task=p.get("prompts"),
        graph=p.get("graph"),
        hierarchy=p.get("hierarchy"),
        result=p.get("search"),
        validation=p.get("validation"),
    )


def _extracted(p: Pipeline) -> measurements.Extracted:
    return measurements.Extracted(p.patched, p.get("prompts"), p.get("graph"), p.get("search"))


def _search_scores(p: Pipeline) -> np.ndarray | None:
    if p.scorer is None:
        return None
    from hagd.artifacts.codec import load_record
    from hagd.search.scorer.apply import score
    from hagd.search.scorer.records import TrainedScorer

    return score(load_record(TrainedScorer, p.scorer), p.get("graph"), p.get("hierarchy"), p.lm.n_layers)


STAGES: dict[str, Stage] = {
    "task": Stage(TaskData, 1, (), decided_by.of_task, _build_task),
    "lm": Stage(
        TrainedLM,
        1,
        ("task",),
        decided_by.of_lm,
        lambda p, work, _: stages.train_mini(p.config, p.get("task"), work, p.loggers("lm")),
        trains=True,
    ),
    "prompts": Stage(
        TaskData,
        1,
        ("task", "lm"),
        lambda p: {"only_correct": p.config.task.only_correct},
        lambda p, _, __: stages.select_prompts(p.config, p.lm, p.get("task")),
    ),
    "transcoders": Stage(
        TranscoderSet,
        6,
        ("prompts", "lm"),
        decided_by.of_transcoders,
        lambda p, work, progress: stages.fit_transcoders(
            p.config, p.lm, p.get("prompts"), work, _activations_folder(p, work), p.loggers("transcoders"), progress
        ),
        trains=True,
    ),
    "means": Stage(
        SlotMeans,
        1,
        ("prompts", "lm", "transcoders"),
        lambda _: {},
        lambda p, _, __: stages.measure_means(p.config, p.lm, p.get("prompts"), p.get("transcoders")),
    ),
    "head_means": Stage(
        HeadMeans,
        1,
        ("prompts", "lm", "transcoders"),
        lambda p: p.config.graph.model_dump(mode="json", include={"head_layers"}),
        lambda p, _, __: stages.measure_head_means(p.config, p.lm, p.get("prompts"), p.get("transcoders")),
    ),
    "graph": Stage(
        AttributionGraph,
        1,
        ("prompts", "lm", "transcoders", "means", "head_means"),
        decided_by.of_graph,
        lambda p, _, progress: stages.attribute(p.config, p.patched, p.get("prompts"), progress),
    ),
    "hierarchy": Stage(
        Hierarchy,
        4,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph"),
        lambda p: p.config.hierarchy.model_dump(mode="json"),
        lambda p, _, progress: stages.partition(p.config, p.patched, p.get("prompts"), p.get("graph"), progress),
    ),
    "search": Stage(
        SearchResult,
        2,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "hierarchy"),
        decided_by.of_search,
        lambda p, _, progress: stages.search(
            p.config, p.patched, p.get("prompts"), p.get("graph"), p.get("hierarchy"), _search_scores(p), progress
        ),
    ),
    "validation": Stage(
        Validation,
        5,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "search"),
        lambda p: p.config.validation.model_dump(mode="json", exclude={"batch_size", "shift", "dark_matter"}),
        lambda p, _, progress: stages.validate_circuit(
            p.config, p.patched, p.get("prompts"), p.get("graph"), p.get("search"), progress
        ),
    ),
    "report": Stage(
        ReportData,
        7,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "hierarchy", "search", "validation"),
        decided_by.of_report,
        lambda p, _, progress: assemble(_extraction(p), progress),
    ),
    "shift": Stage(
        Shift,
        1,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "search"),
        lambda p: p.config.validation.model_dump(mode="json", include={"n_random", "n_bootstrap"}),
        lambda p, _, progress: measurements.shift(p.config, _extracted(p), progress),
    ),
    "dark_matter": Stage(
        DarkMatter,
        1,
        ("prompts", "lm", "transcoders", "means"),
        lambda p: p.config.validation.model_dump(mode="json", include={"n_bootstrap"}),
        lambda p, _, progress: measurements.dark_matter(
            p.config, p.lm, p.get("prompts"), p.get("transcoders"), p.get("means"), progress
        ),
    ),
    "comparison": Stage(
        Comparison,
        1,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "search"),
        decided_by.of_comparison,
        lambda p, _, progress: measurements.compare_circuits(
            p.config.comparison, _extracted(p), _extracted(p.compared), p.config.seed, progress
        ),
    ),
    "prompt_graph": Stage(
        PromptGraph,
        3,
        ("prompts", "lm", "transcoders"),
        decided_by.of_prompt_graph,
        lambda p, work, progress: prompt_stages.explain_prompt(
            p.config, p.lm, p.get("prompts"), p.get("transcoders"), work, progress
        ),
    ),
    "prompt_hierarchy": Stage(
        Hierarchy,
        2,
        ("prompt_graph",),
        lambda p: p.config.hierarchy.model_dump(mode="json", include={"branching", "min_size"}),
        lambda p, _, __: build_prompt_hierarchy(p.get("prompt_graph"), p.config.hierarchy, p.config.seed),
    ),
    "prompt_report": Stage(
        PromptReport,
        5,
        ("prompts", "lm", "transcoders", "prompt_graph", "prompt_hierarchy"),
        lambda _: {},
        lambda p, _, __: prompt_stages.report_prompt(
            p.config, p.lm, p.get("prompts"), p.get("transcoders"), p.get("prompt_graph"), p.get("prompt_hierarchy")
        ),
    ),
}
