"""What a stored report is shown with, which no stage stores: it may differ between runs that share the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hagd.report.records import LayerReconstruction, NodeView, ReportData, SearchPart


def in_slot_order(data: ReportData, order: Sequence[int]) -> ReportData:
    """The same with slots, and whatever names one, in the order of these indices of `data.slot_names`."""
    place = {slot: i for i, slot in enumerate(order)}

    def moved(node: NodeView) -> NodeView:
        return replace(node, slot=place[node.slot])

    def reordered(layer: LayerReconstruction) -> LayerReconstruction:
        return replace(layer, slot_fvu=tuple(layer.slot_fvu[slot] for slot in order) if layer.slot_fvu else ())

    return replace(
        data,
        slot_names=tuple(data.slot_names[slot] for slot in order),
        nodes=tuple(map(moved, data.nodes)),
        reconstruction=tuple(map(reordered, data.reconstruction)),
    )


def with_pruning(data: ReportData, not_pruned: str | None) -> ReportData:
    """The same where the note of causal pruning counts the reported circuit too, and a warning says if it has none."""

    def told(part: SearchPart) -> SearchPart:
        own = f"{part.changed_nodes} nodes of the reported circuit"
        return replace(part, note=f"{own}; {part.note}") if part.name == "pruning" else part

    warnings = data.warnings if not_pruned is None else (*data.warnings, not_pruned)
    return replace(data, search=tuple(map(told, data.search)), warnings=warnings)
