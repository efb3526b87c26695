"""Records of the validation stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CurvePoints:
    """One method over circuit sizes, on the validation split, error terms at their mean.

    Attributes:
        method: `circuit`, `attribution`, `gradient_activation` or `random`.
        sizes: nodes kept, ascending.
        faithfulness: F at each size.
        preservation: φ at each size. low, high: its 95 % bootstrap interval.
    """

    method: str
    sizes: tuple[int, ...]
    faithfulness: tuple[float, ...]
    preservation: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Validation:
    """All figures read off the validation split, once.

    Attributes:
        metrics: flat, keys as in `metrics.json`; `<key>.low` and `<key>.high` bound 95 % intervals.
        curves: the extracted circuits first, then the controls.
    """

    metrics: dict[str, float]
    curves: tuple[CurvePoints, ...]


@dataclass(frozen=True)
class Comparison:
    """How alike two circuits are; `metrics` is flat, keys as in `metrics.json`."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class Shift:
    """How a circuit does on other wordings; `metrics` is flat, keys as in `metrics.json`, none without such prompts."""

    metrics: dict[str, float]


@dataclass(frozen=True)
class DarkMatter:
    """What the dictionaries' errors hold; `metrics` is flat, keys as in `metrics.json`."""

    metrics: dict[str, float]
