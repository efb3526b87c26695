"""Prompts of text tasks before they become tensors.

Shape legend: N prompts, C options, T token positions, A scored positions, K accepted tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hagd.errors import TaskError
from hagd.tasks.records import PADDING, AccuracyRule, Prompts, TaskData

UNSEEN_TOKEN = 0
"""Fills sequences on the right, where a causal model never looks from an earlier position."""


@dataclass(frozen=True)
class Option:
    """One token sequence; fields as in `Prompts`, for one prompt and option, with slots by name."""

    tokens: tuple[int, ...]
    counterfactual: tuple[int, ...]
    slots: tuple[str, ...]
    scored: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    distractors: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        assert len(self.tokens) == len(self.counterfactual) == len(self.slots)
        assert len(self.scored) == len(self.answers) == len(self.distractors)


Example = tuple[Option, ...]
"""A prompt's options, the correct one first."""


def next_token_example(
    tokens: tuple[int, ...],
    counterfactual: tuple[int, ...],
    slots: tuple[str, ...],
    answers: Sequence[int],
    distractors: Sequence[int],
) -> Example:
    """A prompt whose answer is the token after its last one."""
    unique = tuple(tuple(dict.fromkeys(tokens_of)) for tokens_of in (answers, distractors))
    return (Option(tokens, counterfactual, slots, (len(tokens) - 1,), (unique[0],), (unique[1],)),)


def assemble(
    *,
    name: str,
    splits: dict[str, list[Example]],
    accuracy: AccuracyRule,
    chance: float,
    length_normalised: bool = False,
) -> TaskData:
    """The task from its examples.

    Examples of later splits with a slot that discovery never shows are left out: their ablation values would be
    undefined.

    Raises:
        TaskError: a split is empty.
    """
    names = tuple(dict.fromkeys(slot for example in splits["discovery"] for option in example for slot in option.slots))
    prompts = {}
    for split, examples in splits.items():
        known = [e for e in examples if all(slot in names for option in e for slot in option.slots)]
        if not known:
            raise TaskError(
                f"task.n_discovery={len(splits['discovery'])}: each of the {len(examples)} prompts of task={name} for "
                f"{split} has a slot that no prompt for discovery has; raise task.n_discovery or task.n_{split}"
            )
        prompts[split] = collate(known, names)
    return TaskData(
        name=name,
        slot_names=names,
        accuracy=accuracy,
        length_normalised=length_normalised,
        chance=chance,
        vocabulary=(),
        train=None,
        discovery=prompts["discovery"],
        selection=prompts["selection"],
        validation=prompts["validation"],
    )


def collate(examples: Sequence[Example], names: Sequence[str]) -> Prompts:
    """Right-padded tensors of examples with equally many options; `names` index the slots."""
    slot_index = {name: i for i, name in enumerate(names)}
    return Prompts(
        tokens=_pad([[o.tokens for o in e] for e in examples], 3, UNSEEN_TOKEN),
        counterfactual=_pad([[o.counterfactual for o in e] for e in examples], 3, UNSEEN_TOKEN),
        slots=_pad([[[slot_index[slot] for slot in o.slots] for o in e] for e in examples], 3),
        scored=_pad([[o.scored for o in e] for e in examples], 3),
        answers=_pad([[o.answers for o in e] for e in examples], 4),
        distractors=_pad([[o.distractors for o in e] for e in examples], 4),
    )


def _pad(nested: Sequence[object], n_dims: int, value: int = PADDING) -> Tensor:
    """int64 tensor of nested sequences of unequal lengths."""
    shape = [0] * n_dims

    def measure(item: object, dim: int) -> None:
        if dim < n_dims:
            assert isinstance(item, (list, tuple))
            shape[dim] = max(shape[dim], len(item))
            for part in item:
                measure(part, dim + 1)

    def filled(item: object, dim: int) -> object:
        if dim == n_dims:
            return item
        parts = [filled(part, dim + 1) for part in item] if isinstance(item, (list, tuple)) else []
        return parts + [filled(() if dim + 1 < n_dims else value, dim + 1) for _ in range(shape[dim] - len(parts))]

    measure(nested, 0)
    # An empty last dimension (no distractors at all) would break reductions over it.
    shape[-1] = max(shape[-1], 1)
    return torch.tensor(filled(nested, 0), dtype=torch.int64).reshape(shape)
