from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.errors import TaskError
from hagd.tasks.splits import MAX_ENUMERATED, partner_with_other_answer, seeded, split_codes, split_groups


@given(radices=st.lists(st.integers(2, 9), min_size=3, max_size=8), share=st.floats(0.1, 1), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_codes_are_distinct_and_in_range(radices: list[int], share: float, seed: int) -> None:
    total = min(math.prod(radices), 2000)
    size = max(1, int(total * share / 2))
    codes = split_codes({"a": size, "b": size}, radices, "", seeded(seed))
    rows = torch.cat([codes["a"], codes["b"]])
    assert len(torch.unique(rows, dim=0)) == 2 * size
    assert (rows >= 0).all() and (rows < torch.tensor(radices)).all()


def test_sampled_codes_cover_the_space_evenly() -> None:
    radices = [MAX_ENUMERATED, 2]
    codes = split_codes({"a": 4000}, radices, "", seeded(0))["a"].double()
    assert codes[:, 0].mean().item() == pytest.approx(MAX_ENUMERATED / 2, rel=0.03)
    assert codes[:, 1].mean().item() == pytest.approx(0.5, abs=0.03)
    halves = codes[:2000, 0].mean() / codes[2000:, 0].mean()
    assert halves.item() == pytest.approx(1, abs=0.06)  # neither half of a sorted list


@given(answer=st.lists(st.integers(0, 4), min_size=2, max_size=50), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_partners_answer_otherwise(answer: list[int], seed: int) -> None:
    tensor = torch.tensor(answer)
    if len(set(answer)) == 1:
        with pytest.raises(TaskError, match=r"task\.n_discovery"):
            partner_with_other_answer(tensor, seeded(seed), "discovery")
    else:
        assert (tensor[partner_with_other_answer(tensor, seeded(seed), "discovery")] != tensor).all()


def test_partners_are_uniform() -> None:
    answer = torch.tensor([7, 1, 1, 2]).repeat(3000)
    partner = partner_with_other_answer(answer, seeded(0), "discovery")
    chosen = answer[partner[answer == 7]]
    assert (chosen == 1).double().mean().item() == pytest.approx(2 / 3, abs=0.04)


@given(
    groups=st.lists(st.integers(1, 4), min_size=3, max_size=60),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40)),
)
def test_groups_stay_together(groups: list[int], sizes: tuple[int, int, int]) -> None:
    items = [[(group, member) for member in range(size)] for group, size in enumerate(groups)]
    wanted = dict(zip("abc", sizes, strict=True))
    splits = split_groups(items, wanted, "source")
    owners = [{group for group, _ in found} for found in splits.values()]
    assert not (owners[0] & owners[1] or owners[0] & owners[2] or owners[1] & owners[2])
    assert all(1 <= len(splits[name]) <= wanted[name] for name in wanted)


def test_scarce_data_is_divided_in_proportion() -> None:
    splits = split_groups([[i] for i in range(50)], {"a": 200, "b": 100, "c": 200}, "source")
    assert [len(found) for found in splits.values()] == [20, 10, 20]


def test_groups_are_read_only_until_full() -> None:
    source = iter([[i] for i in range(100)])
    split_groups(source, {"a": 2, "b": 2, "c": 2}, "source")
    assert next(source) == [6]


def test_too_few_groups() -> None:
    with pytest.raises(TaskError, match=r"task\.data_files=x: too few usable prompts.*found 2, so c is empty"):
        split_groups([[1], [2]], {"a": 5, "b": 5, "c": 5}, "task.data_files=x")
