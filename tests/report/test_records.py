from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hagd.errors import ArtifactError
from hagd.report.records import Curve, Edges, ReportData, SearchPart, SizedCircuit, SupernodeView
from hagd.report.shown import in_slot_order, with_pruning


def test_every_problem_is_named_at_once(report: ReportData) -> None:
    metrics = {key: value for key, value in report.metrics.items() if key != "empty.accuracy"}
    edges = Edges(np.array([10**6]), np.array([0]), np.array([1.0]))
    nodes = (replace(report.nodes[5], slot=9), *report.nodes)
    curves = (Curve("short", (10, 20), (0.1,), (0.1, 0.2)),)
    with pytest.raises(ArtifactError) as error:
        replace(report, metrics=metrics, edges=edges, nodes=nodes, curves=curves)
    message = str(error.value)
    for part in ("empty.accuracy", "1000000", "distinct", "found [9]", "'short'"):
        assert part in message


def test_supernode_paths_must_index_every_level(report: ReportData) -> None:
    node = next(node for node in report.nodes if node.supernodes)
    with pytest.raises(ArtifactError, match=r"node\.supernodes"):
        replace(report, nodes=(replace(node, supernodes=(99, 0, 0)), *(n for n in report.nodes if n.id != node.id)))


def test_the_reported_circuit_is_cut_out(report: ReportData) -> None:
    nodes = {node.id: node for node in report.nodes}
    members = report.circuits[1].nodes
    cut = replace(report, metrics={**report.metrics, "circuit.nodes": len(members)}).reported()
    kept = {i for i, node in nodes.items() if i in members or node.kind != "feature"}
    columns = zip(*(getattr(report.edges, name).tolist() for name in ("source", "target", "weight")), strict=True)
    edges = [edge for edge in columns if edge[0] in kept and edge[1] in kept]
    assert list(zip(*(getattr(cut.edges, n).tolist() for n in ("source", "target", "weight")), strict=True)) == edges
    touched = {i for edge in edges for i in edge[:2]} | set(members.tolist())
    assert [node.id for node in cut.nodes] == [i for i in nodes if i in touched]
    assert cut.circuits == () and cut.reported() is cut


def test_circuits_must_hold_nodes_of_the_report_and_the_reported_one(report: ReportData) -> None:
    with pytest.raises(ArtifactError, match=r"others in circuits \[0\]"):
        replace(report, circuits=(SizedCircuit(np.array([10**6])), report.circuits[-1]))
    with pytest.raises(ArtifactError, match=r"found sizes \[10\]"):
        replace(report, circuits=report.circuits[:1])
    with pytest.raises(ArtifactError, match="ascend by size"):
        replace(report, circuits=report.circuits[::-1])


def test_edges_of_unequal_length_are_refused(report: ReportData) -> None:
    with pytest.raises(ArtifactError, match="one length"):
        replace(report, edges=Edges(np.zeros(2, int), np.zeros(3, int), np.zeros(2)))


def test_interval_needs_both_bounds(report: ReportData) -> None:
    assert report.interval("validation.preservation") == (0.927, 0.969)
    assert report.interval("validation.necessity") is None


def test_colours_come_from_the_coarsest_level_that_divides(report: ReportData) -> None:
    nodes = tuple(replace(node, supernodes=(0, *node.supernodes) if node.supernodes else ()) for node in report.nodes)
    root = replace(report.levels[0], supernodes=(SupernodeView("everything", 200, "=", "L0–1"),))
    assert report.coarsest() == 0
    assert replace(report, nodes=nodes, levels=(root, *report.levels)).coarsest() == 1


def test_nodes_and_fvu_stay_with_their_slots_in_another_order(report: ReportData) -> None:
    order = list(range(len(report.slot_names)))[::-1]
    moved = in_slot_order(report, order)
    assert moved.slot_names == report.slot_names[::-1]
    places = [[(node.id, data.slot_names[node.slot]) for node in data.nodes] for data in (report, moved)]
    assert places[0] == places[1]
    assert [each.slot_fvu for each in moved.reconstruction] == [each.slot_fvu[::-1] for each in report.reconstruction]
    assert in_slot_order(moved, order) == report


def test_pruning_counts_the_reported_circuit_apart(report: ReportData) -> None:
    parts = (SearchPart("gates", 9, 1.0, 7, note="as it was"), SearchPart("pruning", 90, 1.0, 0, note="25 in all"))
    told = with_pruning(replace(report, search=parts), "not pruned")
    assert [part.note for part in told.search] == ["as it was", "0 nodes of the reported circuit; 25 in all"]
    assert told.warnings == (*report.warnings, "not pruned")
    assert with_pruning(report, None).warnings == report.warnings
