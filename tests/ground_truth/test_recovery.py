from __future__ import annotations

from typing import Any

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
    ("name", "changes"),
    [
        pytest.param("counting", {"gate_steps": 70}, id="counting, few steps"),
        *(pytest.param(name, {}, id=name, marks=pytest.mark.slow) for name in MECHANISMS),
    ],
)
def test_the_search_recovers_the_mechanism(name: str, changes: dict[str, Any]) -> None:
    mechanism = MECHANISMS[name]()
    found = recover(mechanism, prepare(mechanism), SearchConfig(sizes=(), **changes))
    assert found.auroc >= 0.95
    assert found.recall > 0.5
