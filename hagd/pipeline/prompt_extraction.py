"""`extract.py graph.scope=prompt`: the graph of one prompt, its run folder and its W&B run.

The task still trains the model and the dictionaries, where these are trained here; its prompts are not explained, so
neither is a circuit of it searched nor validated.
"""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from hagd.artifacts.store import disk_errors
from hagd.attribution.prompt.records import BIAS, PromptGraph, ScoreAttribution
from hagd.attribution.records import KIND_NAMES
from hagd.config.run import ExtractConfig
from hagd.pipeline.outputs import write_manifest, write_metrics
from hagd.pipeline.prompt_plan import described_prompt, prompt_plan, refuse_beyond_limit
from hagd.pipeline.stage_runs import use
from hagd.pipeline.start import start, tracked_pipeline
from hagd.report.assemble import flat_settings
from hagd.report.prompt.neuronpedia import neuronpedia_graph
from hagd.report.prompt.page import write_prompt_report
from hagd.report.prompt.records import PromptReport
from hagd.report.prompt.terminal import print_prompt
from hagd.tracking.sweep_job import SweepJob
from hagd.tracking.wandb_run import Run
from hagd.transcoders.loaded import shown_config
from hagd.transcoders.records import TranscoderSet


def run_prompt(config: ExtractConfig, folder: Path, of_sweep: SweepJob | None, console: Console) -> dict[str, float]:
    """Explain `config.graph.prompt` into `folder`; returns the flat metrics.

    A process that only lends its device to the trainings of another (`is_helper`) exits after them.

    Raises:
        HagdError: anything that the user can act on, first of all a graph larger than `graph.memory_limit_mb`.
    """
    began = time.perf_counter()
    start(config, folder)
    if config.graph.memory_limit_mb is not None:
        refuse_beyond_limit(config, prompt_plan(config))
    else:
        described_prompt(config)  # what is none of this model is refused before anything is trained
    name = f"{config.model.name}-prompt-{config.seed}"
    with tracked_pipeline(config, console, name, of_sweep, "prompt", folder) as (run, pipeline):
        stored: PromptReport = pipeline.get("prompt_report")
        dictionaries: TranscoderSet = pipeline.get("transcoders")
        run.configure(shown_config(config, dictionaries))
        # A stored report may come from a run that differed in what decides no result (paths, devices, tracking).
        data = replace(stored, settings=flat_settings(config, dictionaries))
        for part in ("task", *pipeline.parents("prompt_report")):
            pipeline.get(part)
        graph: PromptGraph = pipeline.get("prompt_graph")
        used = pipeline.used.values()
        metrics = {
            **data.metrics,
            "time.total_s": sum(each.seconds for each in used),
            "time.graph_s": pipeline.used["prompt_graph"].seconds,
            "time.wall_s": time.perf_counter() - began,
            "memory.peak_mb": max(each.peak_mb for each in used),
            "memory.graph_mb": pipeline.used["prompt_graph"].peak_mb,
        }
        with disk_errors(folder):
            write_manifest(pipeline, folder)
            (folder / "graph.json").write_text(json.dumps(graph_json(graph, data), indent=1, allow_nan=False))
            shared = neuronpedia_graph(graph, data, config.graph.pruning)
            (folder / "neuronpedia.json").write_text(json.dumps(shared, allow_nan=False))
            write_prompt_report(data, folder / "report.html")
            write_metrics(metrics, folder)
        _track(run, data, metrics, folder)
        use(run, "prompt_graph", pipeline.used["prompt_graph"])
    print_prompt(data, console)
    console.print(Text(f"\nresults: {folder}"), soft_wrap=True)
    return metrics


def graph_json(graph: PromptGraph, data: PromptReport) -> dict[str, Any]:
    """Nodes and edges, which point from source to target, and the terms of an attention score."""
    nodes = graph.nodes
    columns = (nodes.kind, nodes.layer, nodes.position, nodes.feature, nodes.value, nodes.influence, nodes.bias)
    names = ("kind", "layer", "position", "feature", "value", "influence", "bias")
    listed = [
        {"id": i, **dict(zip(names, row, strict=True))}
        for i, row in enumerate(zip(*(column.tolist() for column in columns), strict=True))
    ]
    for node in listed:
        node["kind"] = KIND_NAMES[node["kind"]]
    ends = (*graph.edge_index, graph.edge_attr, graph.edge_influence)
    return {
        "model": data.model,
        "tokens": list(data.tokens),
        "token_ids": graph.tokens.tolist(),
        "nodes": listed,
        "edges": [
            {"source": s, "target": t, "weight": w, "influence": i}
            for s, t, w, i in zip(*(end.tolist() for end in ends), strict=True)
        ],
        "attention_score": None if graph.score is None else _score_json(graph.score),
    }


def _score_json(score: ScoreAttribution) -> dict[str, Any]:
    """Each end of a term as kind, layer, position and feature; null for the biases."""

    def end(identity: list[int]) -> list[Any] | None:
        return None if identity[0] == BIAS else [KIND_NAMES[identity[0]], *identity[1:]]

    terms = zip(score.ends.tolist(), score.terms.tolist(), strict=True)
    return {
        **{name: getattr(score, name) for name in ("layer", "head", "query", "key", "score", "of_all")},
        "terms": [{"query": end(query), "key": end(key), "value": value} for (query, key), value in terms],
    }


def _track(run: Run, data: PromptReport, metrics: dict[str, float], folder: Path) -> None:
    run.summary(metrics)
    run.table(
        "predictions",
        ("token", "probability", "explained"),
        [(each.text, each.probability, each.explained) for each in data.predictions],
    )
    run.html("report", folder / "report.html")
    run.artifact(f"graph-{run.id}", "graph", folder / "graph.json")
    run.artifact(f"report-{run.id}", "report", folder / "report.html")
