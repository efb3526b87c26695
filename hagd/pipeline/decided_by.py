"""What of the configuration decides the result of each stage, and so is part of its address.

Settings that decide time and space alone are left out, and so are those that another setting switches off.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch

from hagd.config.model import MiniModel, PretrainedModel
from hagd.config.run import TrainerConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.loaded import HELD

if TYPE_CHECKING:
    from hagd.pipeline.pipeline import Pipeline

_NO_RESULT = {"storage", "keep", "memory_mb", "disk_mb", "layer_streaming"}
"""Keys of `transcoder.activations` that decide time and space alone."""

ACTIVATIONS = {"site", "layers", "corpus", "activations"}
"""Keys of `transcoder` that decide what is captured."""

_GREEDY = ("greedy", "greedy_edges")
"""Methods that read `search.greedy_prompts`."""

_TASK_VERSIONS = {"parity": 2, "subject_verb_agreement": 2, "factual_recall": 2}
"""Tasks that have other prompts, or another order of them, than their first version; the others keep their address."""

_OF_A_PROMPT = {"prompt", "logits", "score", "skip_first", "max_features", "strongest", "pruning"}
"""Keys of `graph` that decide the graph of one prompt, and nothing of a task's."""


def of_task(p: Pipeline) -> dict[str, Any]:
    """Prompts and splits; the text of data files counts by its hash, a tokenizer by the files of its model."""
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


def of_lm(p: Pipeline) -> dict[str, Any]:
    """The weights of a mini model."""
    training = p.config.task.model_dump(mode="json").get("training")
    precision = p.config.trainer.precision
    return {**p.config.model.model_dump(mode="json"), "training": training, "precision": precision}


def of_transcoders(p: Pipeline) -> dict[str, Any]:
    """Dictionaries: how they are trained, or which ones are loaded."""
    config = p.config.transcoder.model_dump(mode="json", exclude={"activations": _NO_RESULT})
    path = config.pop("path")
    if path is None:
        corpus = p.config.transcoder.corpus
        if corpus is not None:
            from hagd.activations.corpus import listing

            config["corpus"]["files"] = listing(corpus)
            # Once no sequence had a beginning-of-sequence token, and hub rows without text were read as the word None.
            if corpus.data_files is None or isinstance(p.config.model, PretrainedModel):
                config["corpus"]["version"] = 2
        if config["activation"] == "batch_topk":  # each process picks among its own tokens
            n_processes = _sharing_tokens(p.config.trainer)
            config |= {"processes": n_processes} if n_processes > 1 else {}
        if config["optimiser"] == "adafactor":  # its first version hardly moved the biases
            config["optimiser_version"] = 2
        if config["skip"] and config["lambda_prediction"] > 0:  # predictions once killed the features beside a skip
            config["skip_version"] = 2
        if "mixed" in p.config.trainer.precision and p.config.trainer.accelerator != "cpu":
            config["autocast_version"] = 2  # fewer of the inputs, values and errors were rounded once
        if config["decoder_rate"] == _default("decoder_rate"):
            del config["decoder_rate"]  # results from before it could be set keep their address
        # The default stands for whatever value decides nothing.
        config |= {name: _default(name) for name in _unread(p.config.transcoder)}
        return {**config, "precision": p.config.trainer.precision}
    from hagd.pipeline.dictionaries import identity

    # What the files hold is not decided by these; another address has what contradicts them refused, not reused.
    chosen = {name: config[name] for name in HELD if config[name] != _default(name)}
    return {"site": config["site"], "layers": config["layers"], **chosen, **identity(path)}


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


def of_graph(p: Pipeline) -> dict[str, Any]:
    """The graph of a task."""
    other = {"scope", "batch_size", "memory_limit_mb", "heads", "head_layers", *_OF_A_PROMPT}
    config = p.config.graph.model_dump(mode="json", exclude=other)
    # Edges once read the logit difference whatever the metric; only the graphs that this changed have a new address.
    config |= {} if config["metric"] == "logit_difference" else {"edges_of": config["metric"]}
    return config | _frozen_version(p)


def _frozen_version(p: Pipeline) -> dict[str, int]:
    """Of the frozen linear model; its first version rounded norms and scores of models in half precision too often."""
    return {} if getattr(p.config.model, "dtype", "float32") == "float32" else {"frozen_version": 2}


def of_prompt_graph(p: Pipeline) -> dict[str, Any]:
    """The graph of one prompt."""
    of_heads = {"heads", "head_layers"} if p.config.graph.heads else set()
    return p.config.graph.model_dump(mode="json", include=_OF_A_PROMPT | of_heads) | _frozen_version(p)


def of_search(p: Pipeline) -> dict[str, Any]:
    """The circuits; a scorer counts by what its files hold."""
    config = p.config.search.model_dump(mode="json", exclude={"scorer", "memory_limit_mb"})
    if p.config.search.method not in _GREEDY:
        del config["greedy_prompts"]
    if config["traversal"] and config["loss"] == "both":  # once an evaluation more than the budget
        config["traversal_version"] = 2
    return {**config, "scorer": _scorer_identity(p)}


def _scorer_identity(p: Pipeline) -> str | None:
    if p.scorer is None:
        return None
    files = sorted(file for file in p.scorer.iterdir() if file.suffix in (".safetensors", ".json"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files if file.name != "meta.json")).hexdigest()


def of_report(p: Pipeline) -> dict[str, Any]:
    """What the report measures and warns of."""
    config, limit = p.config.report.model_dump(mode="json"), p.config.transcoder.fvu_warning
    config |= {} if limit == _default("fvu_warning") else {"fvu_warning": limit}
    # Reports of other methods called their circuits HAGD's in their first version; the others keep their address.
    return config if p.config.search.method == "hagd" else {**config, "version": 2}


def of_comparison(p: Pipeline) -> dict[str, Any]:
    """The other circuit by its address, and the numbers of draws."""
    assert p.config.comparison is not None
    numbers = p.config.comparison.model_dump(mode="json", include={"n_null", "n_bootstrap"})
    return {**numbers, "other": p.compared.key("search")}
