"""The order in which slots are shown."""

from __future__ import annotations

from collections import Counter

import torch

from hagd.tasks.records import PADDING, TaskData


def left_to_right(task: TaskData) -> list[int]:
    """Indices of `task.slot_names` such that a slot comes before those that follow it in the prompts.

    Where two slots share a prompt, the one with the lower mean position there comes first; prompts that disagree
    outvote each other. Of the slots that no slot must precede the first of `slot_names` comes next; where votes form
    a cycle, the one that the fewest must precede.
    """
    n_slots = len(task.slot_names)
    splits = (task.discovery, task.selection, task.validation)
    wordings = Counter(tuple(row) for split in splits for row in split.slots.flatten(0, 1).tolist())
    before = torch.zeros(n_slots, n_slots, dtype=torch.int64)
    for wording, n in wordings.items():
        slots = torch.tensor(wording)
        here = slots[slots != PADDING].unique()
        place = torch.stack([(slots == slot).nonzero().float().mean() for slot in here])
        before[here[:, None], here] += n * (place[:, None] < place).long()
    precedes = before > before.T
    order, left = [], list(range(n_slots))
    while left:
        waiting = precedes[left][:, left].sum(0).tolist()
        order.append(left.pop(min(range(len(left)), key=lambda i: waiting[i])))
    return order
