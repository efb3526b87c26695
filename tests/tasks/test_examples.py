from __future__ import annotations

import pytest
import torch

from hagd.errors import TaskError
from hagd.tasks.examples import Example, Option, assemble, collate, next_token_example
from hagd.tasks.records import PADDING
from hagd.tasks.slot_order import left_to_right


def example(length: int, slot: str = "x") -> Example:
    tokens = tuple(range(1, length + 1))
    return next_token_example(tokens, tokens[::-1], (slot,) * (length - 1) + ("last",), [5, 5, 6], [7])


def test_collation_pads_on_the_right() -> None:
    prompts = collate([example(2), example(4)], ["x", "last"])
    assert prompts.tokens[:, 0].tolist() == [[1, 2, 0, 0], [1, 2, 3, 4]]
    assert prompts.counterfactual[:, 0].tolist() == [[2, 1, 0, 0], [4, 3, 2, 1]]
    assert prompts.slots[:, 0].tolist() == [[0, 1, PADDING, PADDING], [0, 0, 0, 1]]
    assert prompts.scored[:, 0].tolist() == [[1], [3]]
    assert prompts.answers[0, 0].tolist() == [[5, 6]], "duplicates would be counted twice"


def test_options_of_unequal_length() -> None:
    short = Option((1, 2), (2, 1), ("x", "last"), (1,), ((3,),), ((),))
    long = Option((1, 2, 3), (3, 2, 1), ("x", "x", "last"), (1, 2), ((3,), (4,)), ((), ()))
    prompts = collate([(short, long)], ["x", "last"])
    assert prompts.answers[0, :, :, 0].tolist() == [[3, PADDING], [3, 4]]
    assert prompts.scored[0].tolist() == [[1, PADDING], [1, 2]]
    assert prompts.distractors.shape == (1, 2, 2, 1) and (prompts.distractors == PADDING).all()


def test_slots_that_discovery_lacks_are_left_out() -> None:
    splits = {"discovery": [example(3)], "selection": [example(3, "y"), example(4)], "validation": [example(2)]}
    task = assemble(name="made_up", splits=splits, accuracy="argmax", chance=0.1)
    assert task.slot_names == ("x", "last")
    assert task.selection.tokens.shape == (1, 1, 4)
    assert torch.equal(task.selection.slots, torch.tensor([[[0, 0, 0, 1]]]))


def test_a_split_without_known_slots_is_refused() -> None:
    splits = {"discovery": [example(3)], "selection": [example(3)], "validation": [example(3, "y")]}
    with pytest.raises(TaskError, match=r"task\.n_discovery=1.*made_up for validation.*raise"):
        assemble(name="made_up", splits=splits, accuracy="argmax", chance=0.1)


def shown(*prompts: str) -> list[str]:
    """Slots in the order in which they are shown, of a task whose prompts have these."""
    examples = []
    for prompt in prompts:
        tokens = tuple(range(len(prompt.split())))
        examples.append(next_token_example(tokens, tokens, tuple(prompt.split()), [1], [2]))
    splits = {"discovery": examples, "selection": examples[:1], "validation": examples[:1]}
    task = assemble(name="made_up", splits=splits, accuracy="argmax", chance=0.1)
    return [task.slot_names[slot] for slot in left_to_right(task)]


def test_slots_are_shown_as_prompts_have_them() -> None:
    assert shown("a d", "a b c d", "a b b c d", "a b c e d") == ["a", "b", "c", "e", "d"]
    assert shown("c d", "b c", "x", "a b") == ["x", "a", "b", "c", "d"]
    assert shown("x y z", "y x z", "x y z") == ["x", "y", "z"], "the majority counts"
    assert sorted(shown("a b", "b c", "c a")) == ["a", "b", "c"], "no order fits"
