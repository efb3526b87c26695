"""`extract.py mode=plan`: what the graph of a prompt would cost, before weights are read or anything is trained."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from hagd.artifacts.store import disk_errors
from hagd.attribution.prompt.plan import PromptPlan, plan_prompt
from hagd.attribution.prompt.shape import PromptShape
from hagd.config.model import MiniModel
from hagd.config.run import ExtractConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import linear_attention_shape
from hagd.models.placement import first_device
from hagd.pipeline.dictionaries import read
from hagd.pipeline.outputs import write_config, write_metrics
from hagd.pipeline.prompt_stages import logit_tokens, prompt_tokens
from hagd.pipeline.stages import head_layers
from hagd.report.terminal import plain_table
from hagd.tasks.build import build_task


def run_plan(config: ExtractConfig, folder: Path, console: Console) -> dict[str, float]:
    """Print the plan and write `plan.json` and `metrics.json`; returns the flat figures.

    Raises:
        ConfigError: the plan exceeds `graph.memory_limit_mb`; it is printed nevertheless.
    """
    if config.trainer.threads is not None:
        torch.set_num_threads(config.trainer.threads)
    plan = prompt_plan(config)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_config(config, folder)
        (folder / "plan.json").write_text(json.dumps(plan_json(plan), indent=1))
        write_metrics(plan_metrics(plan), folder)
    console.print(plan_table(plan))
    console.print_json(json.dumps(plan_json(plan)))
    refuse_beyond_limit(config, plan)
    return plan_metrics(plan)


def prompt_plan(config: ExtractConfig) -> PromptPlan:
    """The plan of `graph.prompt`, measured on the device that the model would be on.

    Raises:
        ModelError: `model.device_map` names a device that is not there.
    """
    device = torch.device("cpu")
    if not isinstance(config.model, MiniModel):
        device = first_device(config.model.device_map)
    lm, tokens = described_prompt(config)
    process_mb = psutil.Process().memory_info().rss / 2**20
    return plan_prompt(_shape(config, lm, tokens), device, process_mb)


def described_prompt(config: ExtractConfig) -> tuple[LanguageModel, int]:
    """The model without its weights, and how many tokens `graph.prompt` has.

    Raises:
        ConfigError: the prompt, or a logit that is explained, is none of this model.
    """
    lm, vocabulary = _described(config)
    logit_tokens(config.graph.logits, lm, vocabulary)
    return lm, len(prompt_tokens(config.graph, lm, vocabulary))


def refuse_beyond_limit(config: ExtractConfig, plan: PromptPlan) -> None:
    """Stop before any work when the plan needs more than `graph.memory_limit_mb`.

    Raises:
        ConfigError: names limit and need, and what would lower it.
    """
    limit = config.graph.memory_limit_mb
    for what, need in (("memory", plan.peak_mb), ("scratch disk", plan.disk_mb)):
        if limit is not None and need > limit:
            largest = ", ".join(f"{name} {mb:.0f} MB" for name, mb in plan.memory_mb.items())
            raise ConfigError(
                f"graph.memory_limit_mb: expected a graph that needs at most {limit} MB of {what}, found a plan of "
                f"{need:.0f} MB ({largest}; edges on disk {plan.disk_mb:.0f} MB); shorten graph.prompt, set "
                "graph.strongest or graph.max_features, or raise the limit"
            )


def plan_metrics(plan: PromptPlan) -> dict[str, float]:
    """Flat figures of a plan."""
    return {
        "plan.peak_mb": plan.peak_mb,
        "plan.disk_mb": plan.disk_mb,
        "plan.seconds": plan.total_seconds,
        "plan.active_features": float(plan.active),
        "plan.edges": float(plan.edges),
    }


def plan_json(plan: PromptPlan) -> dict[str, Any]:
    """The whole plan as plain values."""
    return {**asdict(plan), "peak_mb": plan.peak_mb, "total_seconds": plan.total_seconds}


def plan_table(plan: PromptPlan) -> Table:
    """Memory and time by part."""
    table = plain_table("Plan of stage prompt_graph", "part", "MB", "seconds")
    for name in dict.fromkeys([*plan.memory_mb, *plan.seconds]):
        mb, seconds = plan.memory_mb.get(name), plan.seconds.get(name)
        table.add_row(name, "" if mb is None else f"{mb:,.0f}", "" if seconds is None else f"{seconds:.2f}")
    table.add_row("in all", f"{plan.peak_mb:,.0f}", f"{plan.total_seconds:.2f}")
    table.add_row("scratch disk", f"{plan.disk_mb:,.0f}", "")
    return table


def _described(config: ExtractConfig) -> tuple[LanguageModel, tuple[str, ...]]:
    """The model without its weights, and the vocabulary of a mini model's task."""
    if isinstance(config.model, MiniModel):
        from hagd.models.lm_training import n_positions
        from hagd.models.mini import build_mini

        task = build_task(config.task, None, config.seed)
        return build_mini(config.model, len(task.vocabulary), n_positions(task), config.seed), task.vocabulary
    from hagd.models.load import describe_model

    return describe_model(config.model), ()


def _shape(config: ExtractConfig, lm: LanguageModel, tokens: int) -> PromptShape:
    heads, kv_heads, head = linear_attention_shape(lm)
    options, graph = config.transcoder, config.graph
    layers = tuple(range(lm.n_layers)) if options.layers is None else options.layers
    m, k, cross_layer = options.expansion * lm.d_model, options.k, options.cross_layer
    if options.path is not None:
        found = read(options.path).transcoders
        layers = tuple(each.layer for each in found) if options.layers is None else options.layers
        m = max(len(each.W_enc) for each in found)
        k = max(each.k or options.k for each in found)  # thresholds do not say how many
        cross_layer = any(each.W_later for each in found)
    return PromptShape(
        n_layers=lm.n_layers,
        d=lm.d_model,
        heads=heads,
        kv_heads=kv_heads,
        head=head,
        parameters=_parameters(lm),
        weight_bytes=lm.model.dtype.itemsize,
        positions=tokens,
        decomposed=layers,
        m=m,
        k=k,
        skip_first=graph.skip_first,
        cross_layer=cross_layer,
        strongest=graph.strongest,
        most=graph.max_features,
        logits=graph.logits.most if graph.logits.tokens is None else len(graph.logits.tokens),
        head_layers=head_layers(graph, lm, layers),
        parallel=lm.parallel,
    )


def _parameters(lm: LanguageModel) -> int:
    """Without values, tied embeddings are two tensors."""
    unembedding: Any = lm.unembedding
    tied = unembedding.weight.numel() if lm.model.config.tie_word_embeddings else 0
    parameters = {id(parameter): parameter.numel() for parameter in lm.model.parameters()}
    doubled = unembedding.weight is not lm.embedding.weight
    return sum(parameters.values()) - (tied if doubled else 0)
