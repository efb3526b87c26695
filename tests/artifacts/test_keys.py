from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hagd.artifacts.keys import stage_key

BASE = {"stage": "graph", "version": 1, "config": {"a": 1, "b": [1.5, None]}, "parents": {"task": "f0"}, "seed": 0}


def test_key_is_stable_across_versions_of_this_code() -> None:
    assert stage_key(**BASE) == "d7c5d3d232201dc5"


@given(st.permutations(["a", "b", "c", "d"]))
def test_order_of_keys_does_not_matter(order: list[str]) -> None:
    config = {name: ord(name) for name in order}
    assert stage_key("s", 1, config, config, 0) == stage_key("s", 1, dict(sorted(config.items())), config, 0)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": "search"},
        {"version": 2},
        {"config": {"a": 1, "b": [1.5]}},
        {"config": {"a": "1", "b": [1.5, None]}},
        {"parents": {"task": "f1"}},
        {"parents": {"model": "f0"}},
        {"seed": 1},
    ],
)
def test_everything_that_decides_a_result_changes_the_key(change: dict[str, object]) -> None:
    assert stage_key(**{**BASE, **change}) != stage_key(**BASE)


def test_nan_is_refused() -> None:
    with pytest.raises(ValueError, match="JSON"):
        stage_key("s", 1, {"a": float("nan")}, {}, 0)
