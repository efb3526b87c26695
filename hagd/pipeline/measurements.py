"""Stages that measure more when the configuration asks for it; `metrics.json` has their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hagd.attribution.records import AttributionGraph
from hagd.config.comparison import ComparisonConfig
from hagd.config.load import load_config
from hagd.config.run import StagesConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel
from hagd.patching.patched_model import PatchedModel
from hagd.patching.records import SlotMeans
from hagd.pipeline.objectives import discovery_objective
from hagd.pipeline.progress import StageProgress
from hagd.search.baselines import by_method
from hagd.search.records import SearchResult
from hagd.tasks.build import can_shift, shifted_prompts
from hagd.tasks.records import Prompts, TaskData
from hagd.transcoders.records import TranscoderSet
from hagd.validation.activation_profiles import Side
from hagd.validation.comparison import compare
from hagd.validation.dark_matter import measure_errors
from hagd.validation.records import Comparison, DarkMatter, Shift
from hagd.validation.shift import measure_shift


@dataclass(frozen=True)
class Extracted:
    """What of an extraction is compared."""

    patched: PatchedModel
    task: TaskData
    graph: AttributionGraph
    result: SearchResult

    @property
    def vocabulary(self) -> Any:
        """What token numbers mean."""
        tokenizer = self.patched.lm.tokenizer
        return self.task.vocabulary if tokenizer is None else tokenizer.get_vocab()


def measurements(config: StagesConfig) -> tuple[str, ...]:
    """Stages that the job has beside the report."""
    asked = {
        "shift": config.validation.shift and config.graph.scope == "task" and can_shift(config.task),
        "dark_matter": config.validation.dark_matter,
        "comparison": config.comparison is not None,
    }
    return tuple(name for name, wanted in asked.items() if wanted)


def compared_config(config: StagesConfig) -> StagesConfig:
    """Configuration of the extraction that `comparison` asks to compare with.

    Raises:
        ConfigError: the other settings do not fit its model.
    """
    assert config.comparison is not None
    other = {
        **config.model_dump(mode="json"),
        "model": config.comparison.model.model_dump(mode="json"),
        "seed": config.seed + config.comparison.seed_offset,
        "comparison": None,
    }
    try:
        return load_config(type(config), other)
    except ConfigError as error:
        raise ConfigError(f"comparison: expected settings that fit comparison.model too, found: {error}") from None


def shift(config: StagesConfig, extracted: Extracted, progress: StageProgress) -> Shift:
    """Stage `shift`: reads prompts that are in no split."""
    patched, task, graph = extracted.patched, extracted.task, extracted.graph
    assert patched.lm.tokenizer is not None
    prompts = shifted_prompts(config.task, patched.lm.tokenizer, config.seed, task.slot_names)
    if prompts is None:
        return Shift({})
    return measure_shift(
        patched,
        task,
        prompts,
        graph,
        extracted.result.circuit,
        by_method(discovery_objective(config, patched, task), graph, config.graph, "integrated_gradients"),
        config.graph.ablation,
        config.validation,
        config.seed,
        lambda done, total: progress.part("circuits", done, total),
    )


def dark_matter(
    config: StagesConfig,
    lm: LanguageModel,
    task: TaskData,
    transcoders: TranscoderSet,
    means: SlotMeans,
    progress: StageProgress,
) -> DarkMatter:
    """Stage `dark_matter`."""
    device = lm.device
    patched = PatchedModel(lm, transcoders.to(device), means.to(device))
    return measure_errors(
        patched, task, config.validation, config.seed, lambda done, total: progress.part("errors", done, total)
    )


def compare_circuits(
    config: ComparisonConfig | None, ours: Extracted, other: Extracted, seed: int, progress: StageProgress
) -> Comparison:
    """Stage `comparison`: matched on the discovery prompts of both extractions, measured on their validation prompts.

    With other seeds, what one validates the other may have discovered on; such prompts match nothing.

    Raises:
        ConfigError: their prompts are not of one kind.
    """
    assert config is not None
    for what, mine, theirs in (
        ("slots", ours.task.slot_names, other.task.slot_names),
        ("a vocabulary", ours.vocabulary, other.vocabulary),
    ):
        if mine != theirs:
            raise ConfigError(
                f"comparison.model: expected a model that reads the same prompts as {ours.patched.lm.name}, found "
                f"{other.patched.lm.name} with {what} of its own"
            )
    measuring = [ours.task.validation, other.task.validation]
    matching = [_without(split, measuring) for split in (ours.task.discovery, other.task.discovery)]
    return compare(
        Side(ours.patched, ours.graph, ours.result.circuit),
        Side(other.patched, other.graph, other.result.circuit),
        matching,
        measuring,
        n_null=config.n_null,
        n_bootstrap=config.n_bootstrap,
        seed=seed,
        progress=lambda done, total: progress.part("random circuits", done, total),
    )


def _without(prompts: Prompts, others: Sequence[Prompts]) -> Prompts:
    """Those that are in none of `others`."""
    seen = {tuple(tokens) for other in others for tokens in other.tokens.flatten(1).tolist()}
    new = [i for i, tokens in enumerate(prompts.tokens.flatten(1).tolist()) if tuple(tokens) not in seen]
    return prompts[torch.tensor(new, dtype=torch.long)]
