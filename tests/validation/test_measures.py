"""Measures against loops over prompts, and intervals that cover."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hagd.patching.objective import Outcome
from hagd.validation.measures import area_linear, area_log, bootstrap, distance_linear, faithfulness, preservation


def outcome(seed: int, n: int = 9) -> Outcome:
    g = torch.Generator().manual_seed(seed)
    return Outcome(torch.rand(n, generator=g) < 0.6, torch.randn(n, generator=g))


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 0, 8], [5]])
def test_preservation_is_a_ratio_of_accuracies(index: list[int]) -> None:
    circuit, full = outcome(1), outcome(2)
    ours = theirs = 0.0
    for i in index:
        ours += bool(circuit.correct[i])
        theirs += bool(full.correct[i])
    expected = ours / theirs if theirs else math.nan
    assert preservation(circuit, full)(np.array(index)) == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("index", [[0, 1, 2, 3, 4, 5, 6, 7, 8], [3, 3, 0, 8], [5]])
def test_faithfulness_is_a_ratio_of_mean_logit_differences(index: list[int]) -> None:
    circuit, full, empty = outcome(1), outcome(2), outcome(3)
    means = [sum(float(x.logit_difference[i]) for i in index) / len(index) for x in (circuit, full, empty)]
    expected = (means[0] - means[2]) / (means[1] - means[2])
    assert faithfulness(circuit, full, empty)(np.array(index)) == pytest.approx(expected, rel=1e-6)


def test_the_full_model_is_faithful_and_the_empty_one_is_not() -> None:
    full, empty = outcome(2), outcome(3)
    everything = np.arange(9)
    assert faithfulness(full, full, empty)(everything) == 1
    assert faithfulness(empty, full, empty)(everything) == 0
    assert preservation(full, full)(everything) == 1


def test_an_undefined_ratio_is_not_a_number() -> None:
    nothing = Outcome(torch.zeros(4, dtype=torch.bool), torch.zeros(4))
    assert math.isnan(preservation(nothing, nothing)(np.arange(4)))
    assert math.isnan(faithfulness(nothing, nothing, nothing)(np.arange(4)))
    value, low, high = bootstrap(preservation(nothing, nothing), 4, 20, 0)
    assert math.isnan(value) and math.isnan(low) and math.isnan(high)


def test_resamples_without_a_value_are_left_out() -> None:
    one = Outcome(torch.tensor([True, False, False]), torch.zeros(3))  # in 8 of 27 resamples nothing is right
    assert bootstrap(preservation(one, one), 3, 200, 0) == (1, 1, 1)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8, unique=True))
def test_a_perfect_curve_has_area_one(sizes: list[int]) -> None:
    sizes = sorted(sizes)
    assert area_log(sizes, [1.0] * len(sizes)) == pytest.approx(1)
    assert distance_linear(sizes, [1.0] * len(sizes), sizes[-1]) == pytest.approx(0.5 * sizes[0] / sizes[-1])


def test_areas_agree_with_loops() -> None:
    sizes, values, n = [10, 20, 50, 200], [0.1, 0.4, 0.9, 1.1], 200
    log, linear, distance = 0.0, 0.0, 0.0
    for a, b, u, v in zip(sizes, sizes[1:], values, values[1:], strict=False):
        log += (math.log(b) - math.log(a)) * (u + v) / 2
    for a, b, u, v in zip([0, *sizes], sizes, [0.0, *values], values, strict=False):
        linear += (b - a) / n * (u + v) / 2
        distance += (b - a) / n * (abs(1 - u) + abs(1 - v)) / 2
    assert area_log(sizes, values) == pytest.approx(log / math.log(20))
    assert area_linear(sizes, values, n) == pytest.approx(linear)
    assert distance_linear(sizes, values, n) == pytest.approx(distance)


def test_the_log_area_does_not_depend_on_the_base_or_unit_of_size() -> None:
    values = [0.2, 0.5, 0.7]
    assert area_log([1, 10, 100], values) == pytest.approx(area_log([7, 70, 700], values))
    assert area_log([5], [0.3]) == 0.3


def test_the_bootstrap_covers() -> None:
    """95 % intervals contain the truth in about 95 % of many experiments."""
    truth, n, experiments = 0.7, 100, 300
    rng = np.random.default_rng(0)
    hits = 0
    for seed in range(experiments):
        sample = rng.random(n) < truth
        _, low, high = bootstrap(lambda index, sample=sample: float(sample[index].mean()), n, 300, seed)
        hits += low <= truth <= high
    assert 0.91 <= hits / experiments <= 0.98


def test_the_bootstrap_is_deterministic_in_its_seed() -> None:
    circuit, full = outcome(1), outcome(2)
    first, again, other = (bootstrap(preservation(circuit, full), 9, 100, seed) for seed in (0, 0, 1))
    assert first == again and first.value == other.value and first != other
    assert first.low <= first.value <= first.high
