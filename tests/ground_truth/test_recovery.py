from __future__ import annotations

import numpy as np
import pytest

from hagd.config.stages import SearchConfig
from tests.ground_truth.mechanisms import MECHANISMS
from tests.ground_truth.recovery import auroc, prepare, recover


def test_auroc_is_the_share_of_pairs_in_order() -> None:
    rng = np.random.default_rng(0)
    score, members = rng.integers(0, 5, 40), rng.random(40) < 0.3
    pairs = [(a > b) + (a == b) / 2 for a in score[members] for b in score[~members]]
    assert auroc(score, members) == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(
    "name", ["counting", *(pytest.param(n, marks=pytest.mark.slow) for n in MECHANISMS if n != "counting")]
)
def test_the_search_recovers_the_mechanism(name: str) -> None:
    mechanism = MECHANISMS[name]()
    found = recover(mechanism, prepare(mechanism), SearchConfig(sizes=()))
    assert found.auroc >= 0.95
    assert found.recall > 0.5
