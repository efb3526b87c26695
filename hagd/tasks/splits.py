"""Disjoint splits and counterfactual partners, deterministic in the seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Generator, Tensor

from hagd.config.task import FactualRecall, SymbolicTask, TaskBase
from hagd.errors import TaskError
from hagd.tasks.records import TaskData

T = TypeVar("T")

MAX_ENUMERATED = 200_000
"""Spaces of prompts up to this size are enumerated and shuffled; larger ones are sampled without repetition."""


def seeded(seed: int) -> Generator:
    """A CPU generator of its own, so that tasks neither read nor move the global random state."""
    return Generator().manual_seed(seed)


def split_sizes(config: TaskBase) -> dict[str, int]:
    """Wanted prompts of each split; symbolic tasks have `train` too."""
    sizes = {
        "discovery": config.n_discovery,
        "selection": config.n_selection,
        "validation": config.n_validation,
    }
    return {"train": config.n_train, **sizes} if isinstance(config, SymbolicTask) else sizes


def fewer_than_wanted(config: TaskBase, task: TaskData) -> str | None:
    """Splits of a task with fewer prompts than its configuration asks for, and why; None if there are none."""
    wanted = split_sizes(config)
    fewer = [
        f"{name}: {n} of {wanted[name]} prompts"
        for name in ("discovery", "selection", "validation")
        if (n := len(getattr(task, name))) < wanted[name]
    ]
    if not fewer:
        return None
    without = "have a slot that no prompt for discovery has"
    if isinstance(config, FactualRecall):
        without = f"have no counterfactual of their template and length in their split, {without}"
    return f"task {task.name}: {', '.join(fewer)}; the others {without}, or the data have no more that fit"


def split_codes(sizes: dict[str, int], radices: Sequence[int], fix: str, generator: Generator) -> dict[str, Tensor]:
    """Distinct rows of digits, row `i` below `radices[i]`, dealt to disjoint splits.

    A task maps each row to one prompt, so distinct rows are distinct prompts.

    Args:
        sizes: rows wanted a split.
        radices: number of values of each digit; their product is the number of possible prompts.
        fix: what besides smaller splits helps when there are too few, for the message.
        generator: source of randomness.

    Returns:
        int64 `[size, len(radices)]` a split.

    Raises:
        TaskError: fewer possible prompts than wanted.
    """
    wanted, available = sum(sizes.values()), math.prod(radices)
    if wanted > available:
        keys = " + ".join(f"task.n_{name}={size}" for name, size in sizes.items())
        raise TaskError(f"{keys}: {wanted} distinct prompts wanted, {available} exist; lower these sizes or {fix}")
    rows = _distinct_rows(radices, wanted, generator)
    return dict(zip(sizes, torch.split(rows, list(sizes.values())), strict=True))


def some_codes(size: int, radices: Sequence[int], generator: Generator) -> Tensor:
    """Distinct rows as in `split_codes`, `size` of them or as many as there are: int64 `[≤ size, len(radices)]`."""
    return _distinct_rows(radices, min(size, math.prod(radices)), generator)


def _distinct_rows(radices: Sequence[int], n: int, generator: Generator) -> Tensor:
    available = math.prod(radices)
    if available <= MAX_ENUMERATED:
        index = torch.randperm(available, generator=generator)[:n]
        digits = []
        for radix in reversed(radices):
            digits.append(index % radix)
            index = index // radix
        return torch.stack(digits[::-1], dim=1)
    rows = torch.empty(0, len(radices), dtype=torch.int64)
    while len(rows) < n:
        drawn = torch.stack([torch.randint(radix, (n,), generator=generator) for radix in radices], dim=1)
        rows = torch.unique(torch.cat([rows, drawn]), dim=0)
    return rows[torch.randperm(len(rows), generator=generator)[:n]]


def partner_with_other_answer(answer: Tensor, generator: Generator, split: str) -> Tensor:
    """For each row a random row with another answer, uniform over all such rows.

    Args:
        answer: int64 `[N]`, identifies each row's answer.
        generator: source of randomness.
        split: name of the split, for the message.

    Returns:
        int64 `[N]`, row indices.

    Raises:
        TaskError: every row has the same answer.
    """
    _, group, counts = torch.unique(answer, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise TaskError(
            f"task.n_{split}={len(answer)}: a counterfactual needs another answer, but every prompt of the split has "
            f"the same one; raise task.n_{split}"
        )
    order = torch.argsort(group, stable=True)
    start = (counts.cumsum(0) - counts)[group]
    others = len(answer) - counts[group]
    # Skipping one's own block in the sorted order leaves exactly the rows with another answer.
    drawn = (torch.rand(len(answer), generator=generator, dtype=torch.float64) * others).long()
    return order[torch.where(drawn < start, drawn, drawn + counts[group])]


def split_groups(groups: Iterable[Sequence[T]], sizes: dict[str, int], source: str) -> dict[str, list[T]]:
    """Deal groups of related items to splits: no group is in two splits, and sizes are upper bounds.

    The next group goes to the split that is filled least in proportion to its size, so a source that runs dry
    is divided in proportion. `groups` is read only until every split is full.

    Raises:
        TaskError: fewer groups than splits.
    """
    splits: dict[str, list[T]] = {name: [] for name in sizes}
    for group in groups:
        name = min(sizes, key=lambda split: len(splits[split]) / sizes[split])
        splits[name].extend(group[: sizes[name] - len(splits[name])])
        if all(len(splits[split]) == size for split, size in sizes.items()):
            break
    empty = [name for name, items in splits.items() if not items]
    if empty:
        raise TaskError(
            f"{source}: too few usable prompts for the splits {', '.join(sizes)}, found "
            f"{sum(map(len, splits.values()))}, so {', '.join(empty)} is empty; give more data"
        )
    return splits
