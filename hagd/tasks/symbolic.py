"""Prompts of one length for tasks with a vocabulary of their own.

Shape legend: N prompts, T token positions, A scored positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hagd.tasks.records import IGNORED, Prompts, TaskData


def symbolic_prompts(
    tokens: Tensor,
    counterfactual: Tensor,
    scored: Sequence[int],
    answers: Tensor,
    distractors: Tensor,
    labels: Tensor | None = None,
    slots: Sequence[int] | None = None,
) -> Prompts:
    """Prompts of one length, one accepted token and one distractor a scored position.

    Args:
        tokens: int64 `[N, T]`.
        counterfactual: int64 `[N, T]`.
        scored: the A positions that are read, the same in each prompt.
        answers: int64 `[N, A]`.
        distractors: int64 `[N, A]`.
        labels: int64 `[N, T]`, training targets; by default the answers at the scored positions.
        slots: the slot of each of the T positions; by default every position is one.
    """
    n, length = tokens.shape
    if labels is None:
        labels = torch.full_like(tokens, IGNORED)
        labels[:, list(scored)] = answers
    return Prompts(
        tokens=tokens[:, None],
        counterfactual=counterfactual[:, None],
        slots=torch.tensor(range(length) if slots is None else slots).repeat(n, 1, 1),
        scored=torch.tensor(list(scored)).repeat(n, 1, 1),
        answers=answers[:, None, :, None],
        distractors=distractors[:, None, :, None],
        labels=labels,
    )


def symbolic_task(
    *, name: str, slot_names: Sequence[str], vocabulary: Sequence[str], chance: float, splits: Mapping[str, Prompts]
) -> TaskData:
    """A task whose every scored position must be right."""
    return TaskData(
        name=name,
        slot_names=tuple(slot_names),
        accuracy="argmax",
        length_normalised=False,
        chance=chance,
        vocabulary=tuple(vocabulary),
        train=splits["train"],
        discovery=splits["discovery"],
        selection=splits["selection"],
        validation=splits["validation"],
    )
