"""What each stage computes: functions from the records of other stages to one record.

Nothing here decides whether a stage runs; `hagd.pipeline.pipeline` does, by content address.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from hagd.activations.collect import collect
from hagd.activations.plan import Sequences
from hagd.attribution.graph import build_graph
from hagd.attribution.node_attribution import attribute_nodes
from hagd.attribution.records import AttributionGraph
from hagd.config.model import MiniModel
from hagd.config.run import StagesConfig
from hagd.config.stages import GraphConfig
from hagd.config.task import SymbolicTask
from hagd.config.transcoder import TranscoderConfig
from hagd.errors import ConfigError, NumericalError, TaskError
from hagd.hierarchy.activity import activations, intervention_effects, linear_effects
from hagd.hierarchy.coherence import with_coherence
from hagd.hierarchy.partition import build_hierarchy
from hagd.hierarchy.records import Hierarchy
from hagd.models.language_model import LanguageModel
from hagd.models.records import TrainedLM
from hagd.patching.means import head_means, slot_means
from hagd.patching.patched_model import PatchedModel
from hagd.patching.records import HeadMeans, SlotMeans
from hagd.pipeline.memory_limit import refuse_beyond, within
from hagd.pipeline.objectives import discovery_objective, objective_on
from hagd.pipeline.progress import StageProgress
from hagd.search.baselines import by_method
from hagd.search.find_circuit import Searched, find_circuit
from hagd.search.records import SearchResult
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.scoring import is_correct
from hagd.training.fit import refuse_missing_devices
from hagd.transcoders.records import TranscoderSet
from hagd.validation.records import Validation
from hagd.validation.validate import validate

if TYPE_CHECKING:
    from pytorch_lightning.loggers import Logger

log = logging.getLogger(__name__)


def train_mini(config: StagesConfig, task: TaskData, work: Path, loggers: list[Logger]) -> TrainedLM:
    """Stage `lm`: a mini model trained on the task's training sequences."""
    from hagd.models.lm_training import held_out_accuracy, n_positions, train_lm
    from hagd.models.mini import mini_state

    assert isinstance(config.model, MiniModel) and isinstance(config.task, SymbolicTask)
    lm = train_lm(config.model, config.task.training, task, config.seed, config.trainer, work / "checkpoints", loggers)
    return TrainedLM(mini_state(lm), len(task.vocabulary), n_positions(task), held_out_accuracy(lm, task))


@torch.no_grad()
def select_prompts(config: StagesConfig, lm: LanguageModel, task: TaskData) -> TaskData:
    """Stage `prompts`: discovery and selection without the prompts that the full model gets wrong.

    The validation split stays as it is: the model's own accuracy is measured there.

    Raises:
        TaskError: a split is empty afterwards, or the vocabularies do not fit, or prompts are too long for the model.
    """
    splits = (task.discovery, task.selection, task.validation)
    highest = max(int(split.tokens.max()) for split in splits)
    if highest >= lm.vocab_size:
        raise TaskError(
            f"task {task.name}: expected token ids below the model's vocabulary of {lm.vocab_size}, found {highest}; "
            "choose the tokenizer's own model, or train a mini model for this task"
        )
    longest = max(split.tokens.shape[-1] for split in splits)
    if longest > lm.n_positions:
        raise TaskError(
            f"task {task.name}: expected prompts of at most {lm.n_positions} tokens, which model {lm.name} was built "
            f"for, found {longest}; choose another model or shorter prompts"
        )
    if not config.task.only_correct:
        return task
    kept, dropped = {}, 0
    for name in ("discovery", "selection"):
        prompts: Prompts = getattr(task, name)
        right = torch.cat([_correct(lm, task, prompts[i : i + 64]) for i in range(0, len(prompts), 64)])
        if not right.any():
            raise TaskError(
                f"task {task.name}: the model answers none of the {len(prompts)} {name} prompts correctly; train it "
                "longer (task.training.steps), choose another model, or set task.only_correct=false"
            )
        kept[name] = prompts[right.nonzero()[:, 0]]
        dropped += int((~right).sum())
    return replace(task, discovery=kept["discovery"], selection=kept["selection"], n_dropped=dropped)


def _correct(lm: LanguageModel, task: TaskData, prompts: Prompts) -> torch.Tensor:
    prompts = prompts.to(lm.device)
    logits = lm.logits_at(prompts.tokens.flatten(0, 1), prompts.scored.flatten(0, 1))
    if not logits.isfinite().all():
        raise NumericalError(
            f"model {lm.name}: expected finite logits on the prompts of {task.name}, found NaN or infinity; check "
            "model.dtype (float16 overflows) and the weights"
        )
    logits = logits.unflatten(0, prompts.tokens.shape[:2])
    return is_correct(logits, prompts, task.accuracy, task.length_normalised).cpu()


def fit_transcoders(
    config: StagesConfig,
    lm: LanguageModel,
    task: TaskData,
    work: Path,
    activations_folder: Path,
    loggers: list[Logger],
    progress: StageProgress,
) -> TranscoderSet:
    """Stage `transcoders`: activations are captured, dictionaries trained and measured on the selection split.

    `activations_folder` may be that of several trainings. With `transcoder.path` nothing is trained: the dictionaries
    there are measured.
    """
    from hagd.pipeline.dictionaries import given, sampled
    from hagd.transcoders.quality import measure
    from hagd.transcoders.training import train_transcoders

    options = config.transcoder
    if options.path is not None:
        elsewhere = given(options, config.model, lm)
        return _reported(measure(lm, elsewhere, None, None, task.selection, len(task.slot_names)), options)
    layers = tuple(range(lm.n_layers)) if options.layers is None else options.layers
    if layers[-1] >= lm.n_layers or options.k > options.expansion * lm.d_model:
        raise ConfigError(
            f"transcoder.layers and transcoder.k: expected layers below {lm.n_layers} and k at most "
            f"m = expansion × d_model = {options.expansion * lm.d_model}, found layers {list(layers)} and k = "
            f"{options.k}; choose layers of {lm.name}, lower transcoder.k or raise transcoder.expansion"
        )
    refuse_missing_devices(config.trainer)
    with collect(
        lm,
        _training_sequences(config, lm, task, activations_folder, progress),
        options.site,
        layers,
        options.activations,
        folder=activations_folder / "activations",
        seed=config.seed,
        progress=lambda done, total: progress.part("activations", done, total),
    ) as activations:
        progress.end()
        checkpoints = work / "checkpoints"
        done = train_transcoders(options, layers, activations, config.seed, config.trainer, checkpoints, loggers)
        outliers = activations.outliers
    trained = TranscoderSet(lm.name, options.site, done.transcoders, trained_on=sampled(config.model, lm))
    trained = replace(trained, tokens_per_second=done.tokens_per_second, waiting=done.waiting)
    return _reported(measure(lm, trained, done.module, outliers, task.selection, len(task.slot_names)), options)


def _reported(found: TranscoderSet, options: TranscoderConfig) -> TranscoderSet:
    """The same, with a warning for every layer that is explained badly."""
    more = "lower transcoder.lambda_sparsity, raise" if options.activation == "relu" else "raise transcoder.k,"
    advice = f"{more} transcoder.expansion or transcoder.steps"
    if options.path is not None:
        advice = "make sure that transcoder.path was trained for these weights and this site"
    for layer in found.quality:
        if layer.fvu > options.fvu_warning:
            log.warning(
                "transcoder of layer %d leaves %.0f %% of the variance unexplained (warning above %.0f %%): %s, or "
                "circuits will miss what it misses",
                layer.layer,
                100 * layer.fvu,
                100 * options.fvu_warning,
                advice,
            )
    return found


def _training_sequences(
    config: StagesConfig, lm: LanguageModel, task: TaskData, folder: Path, progress: StageProgress
) -> list[Sequences]:
    """The task's training and discovery prompts, then the corpus.

    Raises:
        ConfigError: the corpus has longer sequences than the model was built for, or cannot be read.
    """
    splits = [task.discovery] if task.train is None else [task.train, task.discovery]
    parts = [Sequences(s.tokens.flatten(0, 1), s.slots.flatten(0, 1) >= 0) for s in splits]
    corpus = config.transcoder.corpus
    if corpus is not None:
        from hagd.activations.corpus import corpus_tokens

        assert lm.tokenizer is not None, "refused by the configuration"
        if corpus.context > lm.n_positions:
            raise ConfigError(
                f"transcoder.corpus.context: expected at most {lm.n_positions} tokens a sequence, which model "
                f"{lm.name} was built for, found {corpus.context}; lower it"
            )
        tokens = corpus_tokens(
            corpus, lm.tokenizer, folder / "corpus", lambda done, total: progress.part("corpus", done, total)
        )
        parts.append(Sequences(tokens))
    return parts


def measure_means(config: StagesConfig, lm: LanguageModel, task: TaskData, transcoders: TranscoderSet) -> SlotMeans:
    """Stage `means`: ablation values over the discovery split.

    Raises:
        ConfigError: the dictionaries were trained for another model.
    """
    if transcoders.model != lm.name:
        raise ConfigError(f"transcoders: expected ones trained for model {lm.name}, found {transcoders.model}")
    discovery = task.discovery.to(lm.device)
    return slot_means(lm, transcoders.to(lm.device), discovery, len(task.slot_names), config.graph.batch_size)


def head_layers(config: GraphConfig, lm: LanguageModel, decomposed: tuple[int, ...]) -> tuple[int, ...]:
    """Layers whose heads are nodes; none without `graph.heads`.

    Raises:
        ConfigError: the model has no such layer.
    """
    layers = (config.head_layers or decomposed) if config.heads else ()
    if layers and layers[-1] >= lm.n_layers:
        raise ConfigError(
            f"graph.head_layers: expected layers below {lm.n_layers}, which {lm.name} has, found {list(layers)}"
        )
    return layers


def measure_head_means(
    config: StagesConfig, lm: LanguageModel, task: TaskData, transcoders: TranscoderSet
) -> HeadMeans:
    """Stage `head_means`: ablation values of the heads that are nodes, over the discovery split."""
    layers = head_layers(config.graph, lm, transcoders.layers)
    return head_means(lm, layers, task.discovery.to(lm.device), len(task.slot_names), config.graph.batch_size)


def attribute(config: StagesConfig, patched: PatchedModel, task: TaskData, progress: StageProgress) -> AttributionGraph:
    """Stage `graph`: node attribution, candidates, edges."""
    objective = discovery_objective(config, patched, task)
    attribution = attribute_nodes(objective, config.graph, lambda d, t: progress.part("node attribution", d, t))
    return build_graph(
        patched, task, task.discovery, attribution, config.graph, lambda d, t: progress.part("edges", d, t)
    )


def partition(
    config: StagesConfig, patched: PatchedModel, task: TaskData, graph: AttributionGraph, progress: StageProgress
) -> Hierarchy:
    """Stage `hierarchy`: built on the discovery split, checked by interventions on the selection split."""
    options = config.hierarchy
    profile = None
    if options.affinity == "coactivation":
        profile = activations(discovery_objective(config, patched, task), graph)
    elif options.affinity == "effects":
        profile = linear_effects(discovery_objective(config, patched, task), graph, config.graph.metric)
    hierarchy = build_hierarchy(
        graph, options, config.seed, lambda done, total: progress.part("partition", done, total), profile
    )
    rng = np.random.default_rng(config.seed)
    n_prompts = min(options.coherence_prompts, len(task.selection))
    n_nodes = min(options.coherence_budget * len(task.discovery) // n_prompts, graph.n_candidates)
    if n_nodes < 2:
        return hierarchy
    rows = np.sort(rng.permutation(graph.n_candidates)[:n_nodes])
    effects = intervention_effects(
        objective_on(config, patched, task, task.selection[:n_prompts]),
        graph,
        config.graph.metric,
        rows,
        lambda done, total: progress.part("coherence", done, total),
    )
    return with_coherence(hierarchy, effects, rows, rng)


def search(
    config: StagesConfig,
    patched: PatchedModel,
    task: TaskData,
    graph: AttributionGraph,
    hierarchy: Hierarchy,
    scores: np.ndarray | None,
    progress: StageProgress,
) -> SearchResult:
    """Stage `search`: sees the discovery and the selection split.

    Raises:
        MemoryLimitError: it held more than `search.memory_limit_mb`.
    """
    searched = Searched(
        discovery=objective_on(config, patched, task, task.discovery, config.search.loss),
        selection=objective_on(config, patched, task, task.selection),
        graph=graph,
        hierarchy=hierarchy,
        graph_config=config.graph,
        scores=scores,
        progress=within(config.search.memory_limit_mb, progress.part),
    )
    found = find_circuit(searched, config.search, config.seed)
    refuse_beyond(config.search.memory_limit_mb)
    return found


def validate_circuit(
    config: StagesConfig,
    patched: PatchedModel,
    task: TaskData,
    graph: AttributionGraph,
    result: SearchResult,
    progress: StageProgress,
) -> Validation:
    """Stage `validation`: the only one that reads the validation split."""
    discovery = discovery_objective(config, patched, task)
    controls = {
        "attribution": by_method(discovery, graph, config.graph, "integrated_gradients"),
        "gradient_activation": by_method(discovery, graph, config.graph, "gradient_activation"),
    }
    grid, ablation = config.search.sizes, config.graph.ablation
    return validate(patched, task, graph, result, controls, grid, ablation, config.validation, config.seed, progress)
