import math

import pytest
from learning_rates import ENOUGH, MOST, best_rate, next_rate


def search(missed, default=1.0):
    tried: dict[float, float] = {}
    while (rate := next_rate(default, tried)) is not None:
        tried[rate] = missed(rate)
    return tried


@pytest.mark.parametrize("best", [1e-6, 0.05, 0.2, 0.9, 1.4, 4.0, 30.0, 1e6])
def test_four_to_six_rates_and_an_inner_best_where_that_is_in_reach(best):
    tried = search(lambda rate: abs(math.log(rate / best)))
    assert ENOUGH <= len(tried) <= MOST
    chosen = best_rate(tried)
    if 1 / 27 < best < 81:
        assert min(tried) < chosen < max(tried)
    assert abs(math.log(chosen / best)) == min(abs(math.log(rate / best)) for rate in tried)


def test_diverged_trainings_are_worst():
    tried = search(lambda rate: math.nan if rate > 2 else 1 / rate)
    assert best_rate(tried) == pytest.approx(math.sqrt(1 / 3)) or best_rate(tried) == 1.0
    assert all(rate <= 3.0 for rate in tried)
