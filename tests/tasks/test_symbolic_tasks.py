from __future__ import annotations

import functools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.config.task import ModularArithmetic, Parity, Sorting
from hagd.errors import TaskError
from hagd.tasks.build import build_task
from hagd.tasks.records import IGNORED, Prompts, TaskData
from hagd.tasks.sorting import arrangements

Check = Callable[[TaskData], None]
SMALL = {"n_train": 6, "n_discovery": 6, "n_selection": 6, "n_validation": 6}
SEEDS = st.integers(0, 2**31)


def splits_of(task: TaskData) -> list[Prompts]:
    assert task.train is not None
    return [task.train, task.discovery, task.selection, task.validation]


@given(
    p=st.integers(7, 40),
    operation=st.sampled_from(["+", "-", "*"]),
    n_operands=st.integers(2, 4),
    seed=SEEDS,
)
@settings(max_examples=40, deadline=None)
def test_modular_answers_agree_with_python(
    check_task: Check, p: int, operation: str, n_operands: int, seed: int
) -> None:
    config = ModularArithmetic(p=p, operation=operation, n_operands=n_operands, **SMALL)
    try:
        task = build_task(config, None, seed)
    except TaskError as error:
        assert "same one" in str(error)  # six products can all be zero
        return
    check_task(task)
    python = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}[operation]

    def answer(sequence: list[int]) -> int:
        assert sequence[-1] == p == task.vocabulary.index("=")
        return functools.reduce(python, sequence[:-1]) % p

    for prompts in splits_of(task):
        tokens, counterfactual = prompts.tokens[:, 0].tolist(), prompts.counterfactual[:, 0].tolist()
        right, wrong = prompts.answers.flatten().tolist(), prompts.distractors.flatten().tolist()
        assert [answer(row) for row in tokens] == right
        assert [answer(row) for row in counterfactual] == wrong
        assert all(row in tokens for row in counterfactual)
        assert prompts.labels is not None
        assert prompts.labels.tolist() == [[IGNORED] * n_operands + [r] for r in right]


@given(length=st.integers(6, 70), targets=st.sampled_from(["running", "final"]), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_parity_counts_ones(check_task: Check, length: int, targets: str, seed: int) -> None:
    try:
        task = build_task(Parity(length=length, targets=targets, **SMALL), None, seed)
    except TaskError as error:
        assert "same one" in str(error)  # six strings can all be even
        return
    check_task(task)
    start = task.vocabulary.index("start")
    word = {0: task.vocabulary.index("even"), 1: task.vocabulary.index("odd")}
    assert task.slot_names == ("start", *(f"bit{i}" for i in range(1, length + 1)))
    for prompts in splits_of(task):
        assert prompts.labels is not None
        for row, partner, right, wrong, labels in zip(
            prompts.tokens[:, 0].tolist(),
            prompts.counterfactual[:, 0].tolist(),
            prompts.answers.flatten().tolist(),
            prompts.distractors.flatten().tolist(),
            prompts.labels.tolist(),
            strict=True,
        ):
            bits, other = row[1:], partner[1:]
            assert row[0] == partner[0] == start and labels[0] == IGNORED
            assert len(bits) == length and set(bits) | set(other) <= {0, 1}
            assert right == word[sum(bits) % 2] and wrong == word[sum(other) % 2]
            running = [word[sum(bits[: i + 1]) % 2] for i in range(length)]
            assert partner in prompts.tokens[:, 0].tolist(), "a prompt of another split, or of none"
            assert labels[1:] == (running if targets == "running" else [IGNORED] * (length - 1) + [right])


@given(length=st.integers(2, 6), extra=st.integers(2, 6), separator=st.booleans(), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_sorting_outputs_are_sorted(check_task: Check, length: int, extra: int, separator: bool, seed: int) -> None:
    n_symbols = length + extra + 2
    config = Sorting(length=length, n_symbols=n_symbols, separator=separator, **SMALL)
    try:
        task = build_task(config, None, seed)
    except TaskError as error:
        assert "same one" in str(error)
        return
    check_task(task)
    assert task.chance == pytest.approx(1 / math.factorial(length))
    first = length - 1 + separator
    for prompts in splits_of(task):
        assert (prompts.scored == torch.arange(first, first + length)).all()
        assert prompts.labels is not None
        for row, other, right, wrong, labels in zip(
            prompts.tokens[:, 0].tolist(),
            prompts.counterfactual[:, 0].tolist(),
            prompts.answers[:, 0, :, 0].tolist(),
            prompts.distractors[:, 0, :, 0].tolist(),
            prompts.labels.tolist(),
            strict=True,
        ):
            ordered = sorted(set(row[:length]))
            assert right == ordered and len(ordered) == length
            assert row[length:] == [n_symbols] * separator + ordered[:-1]
            assert sorted(other[:length]) != ordered
            assert labels == [IGNORED] * first + ordered
            for ours, theirs, distractor in zip(ordered, sorted(other[:length]), wrong, strict=True):
                assert distractor == theirs if ours != theirs else 0 <= distractor < n_symbols


@pytest.mark.parametrize(
    ("slots", "separator", "expected"),
    [
        ("role", False, "in in last out out"),
        ("role", True, "in in in sep out out"),
        ("position", False, "in1 in2 in3 out1 out2"),
        ("position", True, "in1 in2 in3 sep out1 out2"),
    ],
)
def test_sorting_slots(slots: str, separator: bool, expected: str) -> None:
    task = build_task(Sorting(length=3, n_symbols=9, separator=separator, slots=slots, **SMALL), None, 0)
    for prompts in splits_of(task):
        for row in prompts.slots[:, 0].tolist():
            assert " ".join(task.slot_names[slot] for slot in row) == expected
    assert len(set(task.slot_names)) == len(task.slot_names)


def test_arrangements_enumerate_each_once() -> None:
    codes = torch.cartesian_prod(*(torch.arange(n) for n in (5, 4, 3)))
    rows = {tuple(row) for row in arrangements(codes, 5).tolist()}
    assert len(rows) == 60 and all(len(set(row)) == 3 for row in rows)


@pytest.mark.parametrize("config", [ModularArithmetic(n_train=2000), Parity(), Sorting()])
def test_same_seed_same_prompts(config: ModularArithmetic | Parity | Sorting) -> None:
    first, second, other = (build_task(config, None, seed) for seed in (3, 3, 4))
    assert torch.equal(first.discovery.tokens, second.discovery.tokens)
    assert torch.equal(first.validation.counterfactual, second.validation.counterfactual)
    assert not torch.equal(first.discovery.tokens, other.discovery.tokens)


def test_global_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    build_task(Parity(), None, 1)
    assert torch.equal(before, torch.get_rng_state())


def test_whole_space_can_be_used() -> None:
    sizes = {"n_train": 2400, "n_discovery": 512, "n_selection": 256, "n_validation": 313}
    task = build_task(ModularArithmetic(p=59, **sizes), None, 0)
    assert sum(map(len, splits_of(task))) == 59**2


@pytest.mark.parametrize(
    ("config", "available", "fix"),
    [
        (ModularArithmetic(p=5), 25, "task.p=5"),
        (Parity(length=4), 16, "task.length=4"),
        (Sorting(length=2, n_symbols=4), 12, "task.n_symbols=4"),
    ],
)
def test_too_few_prompts(config: ModularArithmetic | Parity | Sorting, available: int, fix: str) -> None:
    with pytest.raises(TaskError, match=rf"task\.n_train=2048.*{available} exist.*raise {fix}"):
        build_task(config, None, 0)


def test_sorting_all_symbols_has_one_answer() -> None:
    with pytest.raises(TaskError, match=r"task\.length=4: must be below task\.n_symbols=4"):
        build_task(Sorting(length=4, n_symbols=4, **{key: 2 for key in SMALL}), None, 0)
