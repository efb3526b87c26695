"""The run folder: what scripts and people read after an extraction."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from hagd.artifacts.manifest import git_revision, versions
from hagd.config.run import StagesConfig
from hagd.errors import MemoryLimitError
from hagd.pipeline.job_key import job_key
from hagd.pipeline.pipeline import Pipeline
from hagd.report.figures import write_figures
from hagd.report.html import write_report
from hagd.report.records import ReportData, SupernodeView
from hagd.tracking.wandb_run import Run
from hagd.transcoders.loaded import held
from hagd.transcoders.metrics import SCALARS
from hagd.transcoders.records import DENSITY_EDGES, TranscoderSet


def write_config(config: StagesConfig, folder: Path) -> None:
    """`config.yaml`, resolved."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (folder / "config.yaml").write_text(text, encoding="utf-8")


def write_manifest(pipeline: Pipeline, folder: Path, complete: bool = True) -> None:
    """`manifest.json`: versions, git revision, seed, the job's address, and per stage its key, time and peak memory.

    Of dictionaries also what they are, which with `transcoder.path` the configuration does not say. A job of which a
    part failed, not `complete`, gets no address: it is no finished run.
    """
    used = pipeline.used.get("transcoders")
    manifest = {
        "versions": versions(),
        "git_revision": git_revision(),
        "command": sys.argv,
        "seed": pipeline.config.seed,
        **({"job_key": job_key(pipeline.config)} if complete else {}),
        **({} if used is None else {"dictionaries": held(used.record)}),
        "stages": {
            name: {
                "key": stored.key,
                "reused": stored.reused,
                "seconds": stored.seconds,
                "peak_mb": stored.peak_mb,
            }
            for name, stored in pipeline.used.items()
        },
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def write_stopped(pipeline: Pipeline, error: MemoryLimitError, folder: Path) -> None:
    """`stopped.json` of a run that held too much memory: the job's address and the figures."""
    content = {
        "job_key": job_key(pipeline.config),
        "peak_mb": error.peak_mb,
        "limit_mb": error.limit_mb,
    }
    (folder / "stopped.json").write_text(json.dumps(content, indent=1))


def write_results(data: ReportData, metrics: dict[str, float], folder: Path) -> tuple[Path, ...]:
    """`circuit.json`, `figures/*.png`, `report.html` and, last, `metrics.json`; returns the figures."""
    reported = data.reported()
    (folder / "circuit.json").write_text(json.dumps(circuit_json(reported), indent=1, allow_nan=False))
    figures = write_figures(reported, folder / "figures")
    write_report(data, folder / "report.html")
    write_metrics(metrics, folder)
    return figures


def write_metrics(metrics: dict[str, float], folder: Path) -> None:
    """`metrics.json`; undefined figures (NaN), which JSON lacks, are left out."""
    clean = {key: value for key, value in sorted(metrics.items()) if value == value}
    (folder / "metrics.json").write_text(json.dumps(clean, indent=1, allow_nan=False))


def circuit_json(data: ReportData) -> dict[str, Any]:
    """Nodes and edges of the circuit, and the supernodes of each level; edges point from source to target."""
    return {
        "model": data.model,
        "task": data.task,
        "seed": data.seed,
        "slots": list(data.slot_names),
        "nodes": [
            {
                "id": node.id,
                "kind": node.kind,
                "layer": node.layer,
                "slot": data.slot_names[node.slot],
                "feature": node.feature,
                "score": node.score,
                "mean_activation": node.mean_activation,
                "ablation_effect": node.ablation_effect,
                "supernodes": list(node.supernodes),
            }
            for node in data.nodes
        ],
        "supernodes": [[_supernode(view) for view in level.supernodes] for level in data.levels],
        "edges": [
            {"source": int(s), "target": int(t), "weight": float(w)}
            for s, t, w in zip(data.edges.source, data.edges.target, data.edges.weight, strict=True)
        ],
    }


def track_dictionaries(run: Run, found: TranscoderSet, slot_names: Sequence[str]) -> None:
    """Tables of the dictionaries' quality, a row a layer, into the W&B run."""
    run.table(
        "reconstruction",
        ("layer", *SCALARS),
        [(q.layer, *(getattr(q, name) for name in SCALARS)) for q in found.quality],
    )
    run.table("fvu by slot", ("layer", *slot_names), [(q.layer, *q.fvu_by_slot) for q in found.quality])
    run.table(
        "feature density",
        ("layer", *(f"{low:g} to {high:g}" for low, high in pairwise(DENSITY_EDGES))),
        [(q.layer, *q.density) for q in found.quality],
    )


def _supernode(view: SupernodeView) -> dict[str, Any]:
    return {
        "label": view.label,
        "nodes": view.n_nodes,
        "slot": view.slot,
        "layers": view.layers,
        "inputs": [token for token, _ in view.inputs],
        "promoted": [token for token, _ in view.promoted],
        "prompts": [list(prompt.tokens) for prompt in view.prompts],
    }


def track(run: Run, data: ReportData, metrics: dict[str, float], figures: Sequence[Path], folder: Path) -> None:
    """Metrics, tables, figures and the report into the W&B run."""
    run.summary(metrics)
    run.table(
        "search",
        ("part", "evaluations", "seconds", "changed nodes", "preservation", "note"),
        [(p.name, p.evaluations, p.seconds, p.changed_nodes, p.preservation_after, p.note) for p in data.search],
    )
    run.table(
        "curves",
        ("method", "nodes", "faithfulness", "preservation", "low", "high"),
        [
            (curve.method, *point)
            for curve in data.curves
            for point in zip(curve.sizes, curve.faithfulness, curve.preservation, curve.low, curve.high, strict=True)
        ],
    )
    run.table(
        "hierarchy",
        ("level", "supernodes", "modularity", "conductance", "eigengap", "coherence", "coherence_null"),
        [
            (
                depth,
                len(level.supernodes),
                level.modularity,
                level.conductance,
                level.eigengap,
                level.coherence,
                level.coherence_null,
            )
            for depth, level in enumerate(data.levels, start=1)
        ],
    )
    for figure in figures:
        run.figure(f"figures/{figure.stem}", figure)  # a table has the name of a figure
    run.html("report", folder / "report.html")
    run.artifact(f"circuit-{run.id}", "circuit", folder / "circuit.json")
    run.artifact(f"report-{run.id}", "report", folder / "report.html")
