"""Sentences and number formats that the terminal and the page share, so that both say the same."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from hagd.report.records import NodeView, ReportData

Standing = Literal["above", "overlaps", "below"]

CONTROLS = (
    ("empty circuit", "empty.preservation"),
    ("random nodes", "control.random.preservation"),
    ("integrated gradients", "control.attribution.preservation"),
)

METRIC_NAMES = {
    "model.accuracy": "Full model, accuracy",
    "model.chance": "Uniform guess, accuracy",
    "empty.accuracy": "Empty circuit, accuracy",
    "transcoder.spliced_accuracy": "Model with transcoders spliced in, accuracy",
    "transcoder.fvu": "Transcoders, unexplained variance",
    "transcoder.l0": "Transcoders, active features a token",
    "transcoder.dead": "Transcoders, dead features",
    "graph.nodes": "Attribution graph, nodes",
    "graph.edges": "Attribution graph, edges",
    "graph.tokens": "Prompt, tokens",
    "graph.active_features": "Active features",
    "graph.edges_computed": "Edges before pruning",
    "graph.features": "Attribution graph, features",
    "graph.heads": "Attribution graph, attention heads",
    "graph.errors": "Attribution graph, error nodes",
    "graph.logits": "Attribution graph, logits",
    "graph.replacement": "Replacement score",
    "graph.completeness": "Completeness score",
    "graph.score": "Attention score before softmax",
    "graph.sum_error": "Largest deviation of edges and bias from an activation",
    "hierarchy.levels": "Hierarchy, levels",
    "hierarchy.modularity": "Hierarchy, modularity",
    "hierarchy.coherence": "Hierarchy, coherence of supernodes under interventions",
    "hierarchy.coherence_null": "Hierarchy, coherence of random groups",
    "circuit.nodes": "Circuit, nodes",
    "circuit.features": "Circuit, features",
    "circuit.heads": "Circuit, attention heads",
    "circuit.edges": "Circuit, edges",
    "validation.preservation": "Preservation (error terms at their mean)",
    "validation.preservation_lenient": "Preservation (error terms kept)",
    "validation.preservation_resample": "Preservation (ablation by resampling)",
    "validation.preservation_mean": "Preservation (ablation to the mean)",
    "validation.sufficiency": "Sufficiency",
    "validation.necessity": "Necessity",
    "validation.minimality": "Minimality",
    "validation.node_effect": "Faithfulness moved by removing one node",
    "validation.incompleteness": "Incompleteness",
    "validation.n_prompts": "Held-out prompts",
    "shift.n_prompts": "Other wordings, prompts",
    "shift.model_accuracy": "Other wordings, full model, accuracy",
    "shift.empty_accuracy": "Other wordings, empty circuit, accuracy",
    "shift.preservation": "Other wordings, preservation",
    "shift.faithfulness": "Other wordings, faithfulness",
    "shift.random.preservation": "Other wordings, random nodes, preservation",
    "shift.attribution.preservation": "Other wordings, integrated gradients, preservation",
    "control.random.preservation": "Control: random nodes, preservation",
    "control.attribution.preservation": "Control: integrated gradients, preservation",
    "control.outsiders.node_effect": "Control: faithfulness moved by adding one from outside",
    "control.random.incompleteness": "Control: random nodes, incompleteness",
    "curve.cpr_log": "Curve, CPR over log size",
    "curve.cpr": "Curve, CPR",
    "curve.cmd": "Curve, CMD",
    "time.total_s": "Time, seconds",
    "memory.peak_mb": "Peak memory, MB",
}


@dataclass(frozen=True)
class Comparison:
    """The circuit against one control of its own size.

    Attributes:
        control: name of the control.
        preservation: of the control.
        interval: 95 %, None where the control has none.
        standing: `above` or `below` only when the 95 % intervals are apart.
    """

    control: str
    preservation: float
    interval: tuple[float, float] | None
    standing: Standing


def number(value: float | None, digits: int = 3) -> str:
    """A value to `digits` significant digits; an en dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    if float(value).is_integer() and abs(value) < 1e12:
        return f"{int(value):,}"
    rounded = f"{value:.{digits}g}"
    return rounded if abs(float(rounded)) < 10**digits else f"{value:,.0f}"


def percent(value: float | None) -> str:
    """A share in per cent with one decimal; an en dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.1f} %"


def bounds(interval: tuple[float, float] | None) -> str:
    """A 95 % interval of a share, `[92.0, 96.9]` in per cent; empty where there is none or it is undefined."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def comparisons(data: ReportData) -> tuple[Comparison, ...]:
    """The circuit's preservation against the empty circuit and the controls that were measured."""
    value = data.metrics["validation.preservation"]
    ours = data.interval("validation.preservation") or (value, value)
    accuracy = data.metrics["model.accuracy"]
    measured = {
        **data.metrics,
        "empty.preservation": data.metrics["empty.accuracy"] / accuracy if accuracy else math.nan,
    }
    return tuple(
        Comparison(name, measured[key], interval, _standing(ours, interval or (measured[key], measured[key])))
        for name, key in CONTROLS
        if key in measured
        for interval in [data.interval(key)]
    )


def _standing(ours: tuple[float, float], other: tuple[float, float]) -> Standing:
    if ours[0] > other[1]:
        return "above"
    return "below" if ours[1] < other[0] else "overlaps"


def does_task(data: ReportData) -> bool:
    """Whether the full model is right more often than a uniform guess; else there is nothing that a circuit keeps."""
    return data.metrics["model.accuracy"] > data.metrics["model.chance"]


def headline(data: ReportData) -> str:
    """Circuit size, preservation with its interval, and the number of prompts; or that the model only guesses."""
    if not does_task(data):
        accuracy, chance = (percent(data.metrics[f"model.{key}"]) for key in ("accuracy", "chance"))
        return (
            f"The model does not do the task: it answers {accuracy} of {number(data.metrics['validation.n_prompts'])} "
            f"held-out prompts correctly, a uniform guess {chance}"
        )
    nodes, prompts = number(data.metrics["circuit.nodes"]), number(data.metrics["validation.n_prompts"])
    preserved, interval = data.metrics["validation.preservation"], data.interval("validation.preservation")
    share = f"{percent(preserved)} {bounds(interval)}".strip()
    if "circuit.heads" in data.metrics:
        kinds = (number(data.metrics[key]) for key in ("circuit.features", "circuit.heads"))
        nodes += " nodes ({} features, {} heads)".format(*kinds)
    else:
        nodes += " nodes"
    return f"A circuit of {nodes} preserves {share} of the model’s accuracy on {prompts} held-out prompts"


def control_line(data: ReportData) -> str:
    """What the empty circuit scores, and the controls at the circuit's size."""
    empty, *sized = (
        f"{_listed([item.control])} {percent(item.preservation)}{f' {bounds(item.interval)}' if item.interval else ''}"
        for item in comparisons(data)
    )
    return f"For comparison: {empty}" + (f"; at the same size {' and '.join(sized)}." if sized else ".")


def verdict(data: ReportData) -> tuple[Standing, str]:
    """The worst standing against any control, and what this run therefore shows."""
    if not does_task(data):
        return "below", (
            f"There is nothing that this circuit of {number(data.metrics['circuit.nodes'])} nodes could preserve: "
            "train the model longer, or choose another model or task."
        )
    found = comparisons(data)
    below, overlaps = (
        [item.control for item in found if item.standing == standing] for standing in ("below", "overlaps")
    )
    if data.interval("validation.preservation") is None:
        return "overlaps", "No interval was computed, so this run does not show that the circuit beats its controls."
    if below:
        return "below", f"The circuit does worse than {_listed(below)}: do not use it as it is."
    if overlaps and "empty circuit" not in overlaps and has_all_candidates(data):
        return "overlaps", (
            f"The circuit is all {number(data.metrics['circuit.nodes'])} candidates, and so is every control of its "
            "size: no number of prompts or seeds tells them apart."
        )
    if overlaps:
        return "overlaps", (
            f"Its 95 % interval overlaps that of {_listed(overlaps)}: this run does not show that the circuit "
            "does better. More prompts or more seeds may decide it."
        )
    return "above", f"Its 95 % interval lies above {_listed([item.control for item in found])}."


def has_all_candidates(data: ReportData) -> bool:
    """Whether no feature or head of the graph is left outside the circuit."""
    metrics = data.metrics
    return metrics["circuit.nodes"] == metrics.get("graph.features", math.nan) + metrics.get("graph.heads", 0)


def warnings(data: ReportData) -> tuple[str, ...]:
    """What the reader must know before believing a number: of the record, and whether the search missed its target."""
    found, target = data.warnings, data.settings.get("search.target_preservation")
    if target is None or data.settings.get("search.n_nodes") != "null" or not has_all_candidates(data):
        return found
    kept = [part.preservation_after for part in data.search if part.preservation_after is not None]
    if any(value < float(target) for value in kept[-1:]):
        found += (
            f"search.n_nodes=null: not even all {number(data.metrics['circuit.nodes'])} candidates keep "
            f"search.target_preservation={target} on the selection split (they keep {percent(kept[-1])}); lower it, "
            "raise graph.n_max, use dictionaries that explain more (transcoder.k), or set search.n_nodes",
        )
    return found


def poor_model(accuracy: float, chance: float, target: float) -> str | None:
    """What to warn of when the full model hardly does its task; None when it does.

    Args:
        accuracy: of the full model on the validation prompts.
        chance: accuracy of a uniform guess.
        target: what the model was trained to reach (`task.training.target_accuracy`); 0 for a pretrained one.
    """
    if accuracy == 0:
        return "the full model answers no validation prompt correctly: preservation is undefined"
    answers = f"the full model answers {accuracy:.1%} of the validation prompts correctly"
    if accuracy < target:
        return f"{answers}, expected at least {target:.0%} (task.training.target_accuracy)"
    if accuracy <= chance:
        return f"{answers}, no more than a uniform guess ({chance:.1%}): preservation says nothing about the task"
    return None


def _listed(names: list[str]) -> str:
    names = ["the empty circuit" if name == "empty circuit" else name for name in names]
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def node_label(node: NodeView) -> str:
    """The node's own label, else what it promotes, else its kind and index."""
    if node.label:
        return visible(node.label)
    if node.kind == "error":
        return "error"
    if node.promoted:
        return " ".join(visible(token) for token, _ in node.promoted[:3])
    return f"{node.kind} {node.feature}"


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣") if token.strip() != token else token
