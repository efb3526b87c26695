"""The list of stages: what each one reads, which part of the configuration decides it, what it computes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hagd.artifacts.keys import stage_key
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.records import AttributionGraph
from hagd.config.model import MiniModel
from hagd.config.run import TrainerConfig
from hagd.config.stages import SearchConfig, TranscoderConfig
from hagd.hierarchy.partition import build_prompt_hierarchy
from hagd.hierarchy.records import Hierarchy
from hagd.models.records import TrainedLM
from hagd.patching.records import HeadMeans, SlotMeans
from hagd.pipeline import measurements, prompt_stages, stages
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

_NO_RESULT = {"storage", "keep", "memory_mb", "disk_mb", "layer_streaming"}
"""Keys of `transcoder.activations` that decide time and space alone."""

_DECIDES_ACTIVATIONS = {"site", "layers", "corpus", "activations"}
"""Keys of `transcoder` that decide what is captured."""

_GREEDY = ("greedy", "greedy_edges")
"""Methods that read `search.greedy_prompts`."""

_DEFAULT_BUDGET = SearchConfig.model_fields["traversal_budget"].default

_TASK_VERSIONS = {"parity": 2, "subject_verb_agreement": 2, "factual_recall": 2}
"""Tasks that have other prompts, or another order of them, than their first version; the others keep their address."""

_OF_A_PROMPT = {"prompt", "logits", "score", "skip_first", "max_features", "strongest", "pruning"}
"""Keys of `graph` that decide the graph of one prompt, and nothing of a task's."""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        record: class of the result.
        version: raised whenever the stage's code gives other results for the same inputs.
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


def _task_config(p: Pipeline) -> dict[str, Any]:
    config = p.config.task.model_dump(mode="json", exclude={"only_correct", "training"})
    if (version := _TASK_VERSIONS.get(config["name"])) is not None:
        config["version"] = version
    data_files = config.get("data_files")
    if data_files:
        from hagd.tasks.data_files import matching_files

        contents = (file.read_bytes() for file in matching_files(data_files))
        config["data_sha256"] = [hashlib.sha256(content).hexdigest() for content in contents]
    # A tokenizer decides the prompts of text tasks; mini models have none.
    return config if isinstance(p.config.model, MiniModel) else {**config, "model": p.model_identity}


def _lm_config(p: Pipeline) -> dict[str, Any]:
    training = p.config.task.model_dump(mode="json").get("training")
    precision = p.config.trainer.precision
    return {**p.config.model.model_dump(mode="json"), "training": training, "precision": precision}


def _transcoders_config(p: Pipeline) -> dict[str, Any]:
    config = p.config.transcoder.model_dump(mode="json", exclude={"activations": _NO_RESULT})
    path = config.pop("path")
    if path is None:
        corpus = p.config.transcoder.corpus
        if corpus is not None:
            from hagd.activations.corpus import listing

            config["corpus"]["files"] = listing(corpus)
            if corpus.data_files is None:  # once rows without text were read as the word None
                config["corpus"]["version"] = 2
        if config["activation"] == "batch_topk":  # each process picks among its own tokens
            n_processes = _sharing_tokens(p.config.trainer)
            config |= {"processes": n_processes} if n_processes > 1 else {}
        if config["optimiser"] == "adafactor":  # its first version hardly moved the biases
            config["optimiser_version"] = 2
        # The default stands for whatever value decides nothing.
        config |= {name: _default(name) for name in _unread(p.config.transcoder)}
        return {**config, "precision": p.config.trainer.precision}
    from hagd.pipeline.dictionaries import identity

    return {"site": config["site"], "layers": config["layers"], **identity(path)}


def _unread(config: TranscoderConfig) -> set[str]:
    """Settings that no dictionary depends on: when a warning is due, and what another kind of dictionary would read."""
    jumps = config.activation == "jumprelu"
    factored = config.lambda_prediction > 0 and config.prediction_head in ("low_rank", "tied_low_rank")
    return {"fvu_warning"} | (set() if jumps else {"bandwidth"}) | (set() if factored else {"head_rank"})


def _default(name: str) -> Any:
    return TranscoderConfig.model_fields[name].default


def _sharing_tokens(trainer: TrainerConfig) -> int:
    """Processes that share the tokens of a batch when dictionaries are trained."""
    if trainer.strategy == "layers":
        return 1
    found = 1 if trainer.accelerator == "cpu" else max(torch.cuda.device_count(), 1)
    devices = found if trainer.devices == "auto" else trainer.devices
    return devices * trainer.num_nodes


def _activations_folder(p: Pipeline, work: Path) -> Path:
    """Scratch, or with `transcoder.activations.keep` one for all trainings on the same activations."""
    if not p.config.transcoder.activations.keep:
        return work
    config = {key: value for key, value in _transcoders_config(p).items() if key in _DECIDES_ACTIVATIONS}
    parents = {parent: p.key(parent) for parent in p.parents("transcoders")}
    return p.runs / "activations" / stage_key("activations", 1, config, parents, p.config.seed)


def _build_task(p: Pipeline, _: Path, __: StageProgress) -> TaskData:
    from hagd.tasks.build import build_task

    tokenizer = None if isinstance(p.config.model, MiniModel) else p.lm.tokenizer
    return build_task(p.config.task, tokenizer, p.config.seed)


def _graph_config(p: Pipeline) -> dict[str, Any]:
    other = {"scope", "batch_size", "memory_limit_mb", "heads", "head_layers", *_OF_A_PROMPT}
    config = p.config.graph.model_dump(mode="json", exclude=other)
    # Edges once read the logit difference whatever the metric; only the graphs that this changed have a new address.
    config |= {} if config["metric"] == "logit_difference" else {"edges_of": config["metric"]}
    return config | _frozen_version(p)


def _frozen_version(p: Pipeline) -> dict[str, int]:
    """Of the frozen linear model; its first version rounded norms and scores of models in half precision too often."""
    return {} if getattr(p.config.model, "dtype", "float32") == "float32" else {"frozen_version": 2}


def _prompt_graph_config(p: Pipeline) -> dict[str, Any]:
    of_heads = {"heads", "head_layers"} if p.config.graph.heads else set()
    return p.config.graph.model_dump(mode="json", include=_OF_A_PROMPT | of_heads) | _frozen_version(p)


def _report_config(p: Pipeline) -> dict[str, Any]:
    config, limit = p.config.report.model_dump(mode="json"), p.config.transcoder.fvu_warning
    config |= {} if limit == _default("fvu_warning") else {"fvu_warning": limit}
    # Reports of other methods called their circuits HAGD's in their first version; the others keep their address.
    return config if p.config.search.method == "hagd" else {**config, "version": 2}


def _extraction(p: Pipeline) -> Extraction:
    return Extraction(
        config=p.config,
        patched=p.patched,
        discovery=stages.discovery_objective(p.config, p.patched, p.get("prompts")),
        task=p.get("prompts"),
        graph=p.get("graph"),
        hierarchy=p.get("hierarchy"),
        result=p.get("search"),
        validation=p.get("validation"),
    )


def _extracted(p: Pipeline) -> measurements.Extracted:
    return measurements.Extracted(p.patched, p.get("prompts"), p.get("graph"), p.get("search"))


def _comparison_config(p: Pipeline) -> dict[str, Any]:
    assert p.config.comparison is not None
    numbers = p.config.comparison.model_dump(mode="json", include={"n_null", "n_bootstrap"})
    return {**numbers, "other": p.compared.key("search")}


def _search_scores(p: Pipeline) -> np.ndarray | None:
    if p.scorer is None:
        return None
    from hagd.artifacts.codec import load_record
    from hagd.search.scorer.apply import score
    from hagd.search.scorer.records import TrainedScorer

    return score(load_record(TrainedScorer, p.scorer), p.get("graph"), p.get("hierarchy"), p.lm.n_layers)


def _search_config(p: Pipeline) -> dict[str, Any]:
    config = p.config.search.model_dump(mode="json", exclude={"scorer", "memory_limit_mb"})
    if p.config.search.method not in _GREEDY:
        del config["greedy_prompts"]
    # Group tests once overran their budget by an evaluation; the default one rarely ends them, and keeps its address.
    if config["traversal"] and config["loss"] == "both" and config["traversal_budget"] != _DEFAULT_BUDGET:
        config["traversal_version"] = 2
    return {**config, "scorer": _scorer_identity(p)}


def _scorer_identity(p: Pipeline) -> str | None:
    if p.scorer is None:
        return None
    files = sorted(file for file in p.scorer.iterdir() if file.suffix in (".safetensors", ".json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.name != "meta.json")).hexdigest()


STAGES: dict[str, Stage] = {
    "task": Stage(TaskData, 1, (), _task_config, _build_task),
    "lm": Stage(
        TrainedLM,
        1,
        ("task",),
        _lm_config,
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
        _transcoders_config,
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
        _graph_config,
        lambda p, _, progress: stages.attribute(p.config, p.patched, p.get("prompts"), progress),
    ),
    "hierarchy": Stage(
        Hierarchy,
        3,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph"),
        lambda p: p.config.hierarchy.model_dump(mode="json"),
        lambda p, _, progress: stages.partition(p.config, p.patched, p.get("prompts"), p.get("graph"), progress),
    ),
    "search": Stage(
        SearchResult,
        2,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "hierarchy"),
        _search_config,
        lambda p, _, progress: stages.search(
            p.config, p.patched, p.get("prompts"), p.get("graph"), p.get("hierarchy"), _search_scores(p), progress
        ),
    ),
    "validation": Stage(
        Validation,
        4,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "search"),
        lambda p: p.config.validation.model_dump(mode="json", exclude={"batch_size", "shift", "dark_matter"}),
        lambda p, _, progress: stages.validate_circuit(
            p.config, p.patched, p.get("prompts"), p.get("graph"), p.get("search"), progress
        ),
    ),
    "report": Stage(
        ReportData,
        6,
        ("prompts", "lm", "transcoders", "means", "head_means", "graph", "hierarchy", "search", "validation"),
        _report_config,
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
        _comparison_config,
        lambda p, _, progress: measurements.compare_circuits(
            p.config.comparison, _extracted(p), _extracted(p.compared), p.config.seed, progress
        ),
    ),
    "prompt_graph": Stage(
        PromptGraph,
        3,
        ("prompts", "lm", "transcoders"),
        _prompt_graph_config,
        lambda p, work, progress: prompt_stages.explain_prompt(
            p.config, p.lm, p.get("prompts"), p.get("transcoders"), work, progress
        ),
    ),
    "prompt_hierarchy": Stage(
        Hierarchy,
        1,
        ("prompt_graph",),
        lambda p: p.config.hierarchy.model_dump(mode="json", include={"branching", "min_size"}),
        lambda p, _, __: build_prompt_hierarchy(p.get("prompt_graph"), p.config.hierarchy, p.config.seed),
    ),
    "prompt_report": Stage(
        PromptReport,
        4,
        ("prompts", "lm", "transcoders", "prompt_graph", "prompt_hierarchy"),
        lambda _: {},
        lambda p, _, __: prompt_stages.report_prompt(
            p.config, p.lm, p.get("prompts"), p.get("transcoders"), p.get("prompt_graph"), p.get("prompt_hierarchy")
        ),
    ),
}
