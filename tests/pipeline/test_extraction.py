"""The whole chain on a tiny model: what it leaves behind, what it computes again, what every option does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from hagd.artifacts.codec import load_record
from hagd.config.load import load_config
from hagd.config.run import ExtractConfig
from hagd.errors import ConfigError
from hagd.pipeline.objectives import discovery_objective
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.stage_list import STAGES
from hagd.search.records import Circuit, SearchResult
from tests.builders import tiny_extract
from tests.pipeline.extractions import BEFORE_SEARCH, PARTS, QUIET, extract, reused

SLOW = pytest.mark.slow

FIGURES = (
    "model.accuracy",
    "model.chance",
    "empty.accuracy",
    "transcoder.fvu",
    "transcoder.l0",
    "transcoder.dead",
    "transcoder.spliced_accuracy",
    "graph.nodes",
    "graph.edges",
    "hierarchy.levels",
    "hierarchy.modularity",
    "hierarchy.coherence",
    "hierarchy.coherence_null",
    "circuit.nodes",
    "circuit.edges",
    "validation.preservation",
    "validation.preservation_lenient",
    "validation.sufficiency",
    "validation.necessity",
    "validation.preservation_resample",
    "validation.minimality",
    "validation.incompleteness",
    "validation.n_prompts",
    "control.random.preservation",
    "control.attribution.preservation",
    "curve.cpr_log",
    "curve.cpr",
    "curve.cmd",
    "time.total_s",
    "memory.peak_mb",
)
WITH_INTERVAL = (
    "validation.preservation",
    "validation.preservation_lenient",
    "validation.preservation_resample",
    "control.random.preservation",
    "control.attribution.preservation",
)


def searched(runs: Path, **changes: Any) -> tuple[Pipeline, SearchResult]:
    pipeline = Pipeline(tiny_extract(runs, **changes), QUIET)
    return pipeline, pipeline.get("search")


def test_the_run_folder_is_complete(tiny_runs: Path) -> None:
    folder = tiny_runs / "first"
    assert {file.name for file in (folder / "figures").iterdir()} == {
        "faithfulness.png",
        "circuit.png",
        "reconstruction.png",
    }
    for file in (folder / "figures").iterdir():
        assert file.read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "<html" in page[:200] and "HAGD circuit, 8 nodes" in page and "nodes of the reported circuit; " in page
    written = load_config(ExtractConfig, yaml.safe_load((folder / "config.yaml").read_text()))
    assert written == tiny_extract(tiny_runs)


def test_metrics_hold_every_figure(tiny_runs: Path) -> None:
    metrics = json.loads((tiny_runs / "first" / "metrics.json").read_text())
    missing = [key for key in FIGURES if not math.isfinite(metrics.get(key, math.nan))]
    assert not missing
    for key in WITH_INTERVAL:
        assert 0 <= metrics[f"{key}.low"] <= metrics[key] <= metrics[f"{key}.high"], key
    assert metrics["circuit.nodes"] == 8 and metrics["validation.n_prompts"] == 20
    assert metrics["model.accuracy"] > 0.8 and metrics["model.chance"] == 0.5
    assert metrics["transcoder.l0"] <= 4


def test_manifest_names_every_stage(tiny_runs: Path) -> None:
    manifest = json.loads((tiny_runs / "first" / "manifest.json").read_text())
    assert set(manifest["stages"]) == set(PARTS)
    for name, stage in manifest["stages"].items():
        assert (tiny_runs / "artifacts" / name / stage["key"] / "meta.json").is_file()
        assert not stage["reused"] and stage["seconds"] >= 0 and stage["peak_mb"] > 0
    assert manifest["versions"]["torch"] and manifest["seed"] == 0


def test_circuit_json_agrees_with_the_records(tiny_runs: Path) -> None:
    circuit = json.loads((tiny_runs / "first" / "circuit.json").read_text())
    pipeline, result = searched(tiny_runs)
    graph = pipeline.get("graph")
    ids = {node["id"] for node in circuit["nodes"]}
    members = {node["id"] for node in circuit["nodes"] if node["kind"] == "feature"}
    assert set(graph.flat[sorted(members)]) == set(result.circuit.nodes)
    weight = {(int(s), int(t)): float(w) for s, t, w in zip(*graph.edge_index, graph.edge_attr, strict=True)}
    assert circuit["edges"]
    for edge in circuit["edges"]:
        assert edge["source"] in ids and edge["target"] in ids
        assert edge["weight"] == pytest.approx(weight[edge["source"], edge["target"]])


def test_every_supernode_is_described(tiny_runs: Path) -> None:
    circuit = json.loads((tiny_runs / "first" / "circuit.json").read_text())
    pipeline, _ = searched(tiny_runs)
    levels, text = pipeline.get("hierarchy").levels, set(pipeline.get("prompts").vocabulary)
    assert len(circuit["supernodes"]) == len(levels)
    for shown, level in zip(circuit["supernodes"], levels, strict=True):
        assert [each["nodes"] for each in shown] == np.bincount(level.supernode).tolist()
        assert all(each["slot"] in each["label"] and each["layers"] in each["label"] for each in shown)
        assert all(set(each["inputs"]) | set(each["promoted"]) <= text for each in shown)
    assert any(each["inputs"] and each["promoted"] and each["prompts"] for each in circuit["supernodes"][0])


def test_effects_in_the_report_are_single_ablations(tiny_runs: Path) -> None:
    config = tiny_extract(tiny_runs, report__effect_prompts=10)
    pipeline = Pipeline(config, QUIET)
    report = pipeline.get("report")
    patched, graph, circuit = pipeline.patched, pipeline.get("graph"), pipeline.get("search").circuit
    objective = discovery_objective(config, patched, pipeline.get("prompts"))
    features = [node for node in report.reported().nodes if node.kind == "feature"]
    assert sorted(graph.flat[[node.id for node in features]]) == circuit.nodes.tolist()
    others = {node.id for node in report.nodes if node.kind == "feature"} - {node.id for node in features}
    assert others and all(node.ablation_effect is None for node in report.nodes if node.id in others)
    for node in features:
        without = Circuit(circuit.nodes[circuit.nodes != graph.flat[node.id]])
        assert len(without) == len(circuit) - 1
        with_it, ablated = (
            float(objective.divergence(each.gates(patched.gate_shape), torch.arange(10))) for each in (circuit, without)
        )
        assert node.ablation_effect == pytest.approx(ablated - with_it, abs=1e-5)


def test_a_part_of_the_search_begins_where_the_one_before_it_ended(tiny_runs: Path) -> None:
    pipeline, _ = searched(tiny_runs)
    parts, steps = pipeline.get("report").search, pipeline.get("search").steps
    assert len(parts) > 2 and parts[0].preservation_before is None
    assert [part.preservation_after for part in parts] == [step.preservation for step in steps]
    assert [part.preservation_before for part in parts[1:]] == [step.preservation for step in steps[:-1]]


def test_the_report_holds_the_circuits_up_to_its_size(tiny_runs: Path) -> None:
    pipeline = Pipeline(tiny_extract(tiny_runs, report__max_nodes=12), QUIET)
    report, graph, result = pipeline.get("report"), pipeline.get("graph"), pipeline.get("search")
    expected = [circuit.nodes.tolist() for circuit in result.circuits if len(circuit) <= 12]
    assert 1 < len(expected) < len(result.circuits)
    assert [sorted(graph.flat[circuit.nodes]) for circuit in report.circuits] == expected
    curve = next(curve for curve in pipeline.get("validation").curves if curve.method == "circuit")
    for circuit in report.circuits:
        at = curve.sizes.index(len(circuit.nodes))
        assert (circuit.preservation, circuit.faithfulness) == (curve.preservation[at], curve.faithfulness[at])
    assert report.metrics["circuit.edges"] == len(report.reported().edges.weight)
    smallest = Pipeline(tiny_extract(tiny_runs, report__max_nodes=0), QUIET).get("report")
    assert {node.id for node in smallest.reported().nodes} == {node.id for node in report.reported().nodes}


@pytest.mark.parametrize(
    "method",
    [
        "integrated_gradients_inputs",
        *(
            pytest.param(name, marks=SLOW)
            for name in ("attribution", "random", "gradient_activation", "gates", "greedy")
        ),  # as test_find_circuit.py
    ],
)
def test_every_method_gives_a_validated_circuit(tiny_runs: Path, tmp_path: Path, method: str) -> None:
    metrics = extract(tiny_extract(tiny_runs, search__method=method), tmp_path)
    assert metrics["circuit.nodes"] == 8 and math.isfinite(metrics["validation.faithfulness"])
    assert reused(tmp_path) == BEFORE_SEARCH
    page = (tmp_path / "report.html").read_text()
    assert "this circuit, 8 nodes" in page and "HAGD circuit" not in page


@pytest.mark.parametrize("part", ["traversal", "elimination", "gates", "pruning"])
def test_every_part_can_be_switched_off(tiny_runs: Path, part: str) -> None:
    _, full = searched(tiny_runs, search__traversal=True)
    _, without = searched(tiny_runs, **{"search__traversal": True, f"search__{part}": False})
    names = [step.name for step in full.steps]
    assert names == ["scorer", "traversal", "elimination", "gates", "pruning"]
    expected = [name for name in names if name != part] if part != "gates" else [*names[:3], "choice", "pruning"]
    assert [step.name for step in without.steps] == expected
    assert len(without.circuit) == 8


def test_without_any_part_the_circuit_is_the_attribution_ranking(tiny_runs: Path) -> None:
    off = {"search__elimination": False, "search__gates": False, "search__pruning": False}
    _, bare = searched(tiny_runs, **off)
    _, ranking = searched(tiny_runs, search__method="attribution")
    assert [c.nodes.tolist() for c in bare.circuits] == [c.nodes.tolist() for c in ranking.circuits]


def test_the_smallest_size_keeps_the_target(tiny_runs: Path, tmp_path: Path) -> None:
    options = {
        "graph__ablation": "resample",
        "search__target_preservation": 0.9,
        "search__gates": False,
        "graph__n_max": 60,
    }
    pipeline, result = searched(tiny_runs, search__n_nodes=None, **options)
    from hagd.pipeline.objectives import objective_on

    selection = objective_on(
        pipeline.config, pipeline.patched, pipeline.get("prompts"), pipeline.get("prompts").selection
    )
    shape = pipeline.patched.gate_shape
    wanted = 0.9 * selection.full().accuracy
    assert selection.outcome(torch.zeros(shape)).accuracy < wanted  # else any size would do
    assert selection.outcome(result.circuit.gates(shape)).accuracy >= wanted
    assert result.size < pipeline.get("graph").n_candidates
    assert len(result.circuit) == result.size
    first = result.steps[0]
    assert first.name == "size" and first.evaluations > 0 and "sizes tried" in first.note
    assert result.evaluations == pytest.approx(sum(step.evaluations for step in result.steps))


@pytest.mark.parametrize(
    "change",
    [
        {"transcoder__site": "resid", "graph__edges": "total", "search__sizes": []},
        {"graph__ablation": "zero", "graph__metric": "log_probability", "transcoder__layers": [1], "graph__n_max": 30},
        pytest.param({"graph__ablation": "resample", "search__sizes": [1, 5000]}, marks=SLOW),
        pytest.param({"graph__error": "keep", "hierarchy__branching": 2, "hierarchy__min_size": 1}, marks=SLOW),
        pytest.param(
            {"transcoder__prediction_head": "dense", "search__traversal_budget": 0, "search__pruning_budget": 0},
            marks=SLOW,
        ),
        pytest.param({"graph__attribution": "gradient_activation"}, marks=SLOW),
    ],
    ids=lambda change: "-".join(f"{key}={value}" for key, value in change.items()),
)
def test_every_option_reaches_the_end(tiny_runs: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    metrics = extract(tiny_extract(tiny_runs, **change), tmp_path)
    assert metrics["circuit.nodes"] == 8
    assert {"task", "lm", "prompts"} <= reused(tmp_path)
    assert (tmp_path / "report.html").is_file()
    assert math.isfinite(metrics["validation.preservation"]) and math.isfinite(metrics["curve.cpr_log"])


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id="direct"),
        pytest.param(
            {"graph__head_layers": [1], "graph__edges": "total", "hierarchy__affinity": "coactivation"},
            id="total",
            marks=SLOW,
        ),
        pytest.param({"graph__ablation": "resample", "transcoder__site": "resid"}, id="resid", marks=SLOW),
    ],
)
def test_heads_are_nodes_to_the_end(tiny_runs: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    config = tiny_extract(tiny_runs, graph__heads=True, search__n_nodes=12, **change)
    metrics = extract(config, tmp_path)
    assert {"task", "lm", "prompts"} <= reused(tmp_path)
    assert metrics["circuit.heads"] + metrics["circuit.features"] == metrics["circuit.nodes"] == 12
    assert metrics["circuit.heads"] > 0 and metrics["graph.heads"] == 6 * len(change.get("graph__head_layers", [0, 1]))
    circuit = json.loads((tmp_path / "circuit.json").read_text())
    heads = [node for node in circuit["nodes"] if node["kind"] == "head"]
    assert len(heads) == metrics["circuit.heads"]
    assert all(node["layer"] in (0, 1) and node["feature"] in (0, 1) for node in heads)
    assert all(math.isfinite(node["ablation_effect"]) and node["supernodes"] for node in heads)
    ids = {node["id"] for node in heads}
    assert any(edge["target"] in ids for edge in circuit["edges"]) and any(e["source"] in ids for e in circuit["edges"])
    assert f"({12 - len(heads)} features, {len(heads)} heads)" in (tmp_path / "report.html").read_text()
    assert math.isfinite(metrics["validation.preservation"]) and metrics["control.random.preservation"] >= 0
    extract(config, tmp_path / "again")
    assert reused(tmp_path / "again") == {*PARTS, "head_means"}


def test_without_heads_no_key_changes(tiny_runs: Path) -> None:
    plain, heads = (Pipeline(tiny_extract(tiny_runs, graph__heads=on), QUIET) for on in (False, True))
    assert {name for name in PARTS if plain.key(name) == heads.key(name)} == BEFORE_SEARCH - {"graph", "hierarchy"}
    assert "head_means" not in plain.parents("report") and "head_means" in heads.parents("report")


def test_more_nodes_than_there_are(tiny_runs: Path) -> None:
    with pytest.raises(ConfigError, match=r"search\.n_nodes: expected at most \d+ .*found 4000; lower it"):
        searched(tiny_runs, search__n_nodes=4000)
    assert not [file for file in (tiny_runs / "artifacts" / "search").iterdir() if file.name.startswith(".")]


def test_records_can_be_read_without_the_pipeline(tiny_runs: Path) -> None:
    stages = json.loads((tiny_runs / "first" / "manifest.json").read_text())["stages"]
    for name, stage in stages.items():
        record = load_record(STAGES[name].record, tiny_runs / "artifacts" / name / stage["key"])
        assert isinstance(record, STAGES[name].record)
