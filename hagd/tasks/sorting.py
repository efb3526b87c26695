"""Sorting: the model reads distinct symbols and writes them in ascending order."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from hagd.config.task import Sorting
from hagd.errors import TaskError
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.splits import partner_with_other_answer, seeded, split_codes, split_sizes
from hagd.tasks.symbolic import symbolic_prompts, symbolic_task


def build(config: Sorting, seed: int) -> TaskData:
    """Tokens are the symbols `0 … n_symbols − 1` and, if configured, the separator `>`.

    A sequence is the input, the separator if any, and the output without its last symbol, which nothing follows.
    Scored are the N positions that predict out1 … outN; without separator the last input predicts out1, so by role
    it has a slot of its own. Accuracy counts whole outputs, so chance is one ordering of the given symbols,
    `1 / length!`. The counterfactual sorts another set of symbols of the same split; the distractor is its symbol
    at the same place, or a random wrong symbol where both agree.

    Raises:
        TaskError: too few distinct inputs, or `length = n_symbols`, where every input has the same answer.
    """
    length, n_symbols = config.length, config.n_symbols
    if length == n_symbols:
        raise TaskError(
            f"task.length={length}: must be below task.n_symbols={n_symbols}, otherwise every input has the same "
            "sorted output; raise task.n_symbols"
        )
    generator = seeded(seed)
    fix = f"raise task.n_symbols={n_symbols} or task.length={length}"
    radices = range(n_symbols, n_symbols - length, -1)
    codes = split_codes(split_sizes(config), radices, fix, generator)
    return symbolic_task(
        name=config.name,
        slot_names=tuple(dict.fromkeys(_slots(config))),
        chance=1 / math.factorial(length),
        vocabulary=(*map(str, range(n_symbols)), *([">"] * config.separator)),
        splits={name: _prompts(config, arrangements(rows, n_symbols), name, generator) for name, rows in codes.items()},
    )


def arrangements(codes: Tensor, n_symbols: int) -> Tensor:
    """Distinct symbols `[N, length]` from Lehmer codes `[N, length]`: digit i picks among the symbols left."""
    left = torch.arange(n_symbols).repeat(len(codes), 1)
    chosen = []
    for digit in codes.unbind(1):
        chosen.append(left.gather(1, digit[:, None]))
        left = left[torch.arange(left.shape[1]) != digit[:, None]].view(len(codes), -1)
    return torch.cat(chosen, dim=1)


def _slots(config: Sorting) -> list[str]:
    """The slot of every position."""
    length, separator = config.length, ["sep"] * config.separator
    if config.slots == "role":
        inputs = ["in"] * length if config.separator else ["in"] * (length - 1) + ["last"]
        return inputs + separator + ["out"] * (length - 1)
    return [f"in{i + 1}" for i in range(length)] + separator + [f"out{i + 1}" for i in range(length - 1)]


def _prompts(config: Sorting, symbols: Tensor, split: str, generator: Generator) -> Prompts:
    n, length = symbols.shape
    ordered = symbols.sort(dim=1).values
    _, symbol_set = torch.unique(ordered, dim=0, return_inverse=True)
    partner = partner_with_other_answer(symbol_set, generator, split)
    separator = torch.full((n, int(config.separator)), config.n_symbols)
    tokens = torch.cat([symbols, separator, ordered[:, :-1]], dim=1)
    wrong = (ordered + torch.randint(1, config.n_symbols, ordered.shape, generator=generator)) % config.n_symbols
    distractors = torch.where(ordered == ordered[partner], wrong, ordered[partner])
    first = length - 1 + int(config.separator)
    slots = _slots(config)
    names = list(dict.fromkeys(slots))
    return symbolic_prompts(
        tokens,
        tokens[partner],
        range(first, first + length),
        ordered,
        distractors,
        slots=[names.index(slot) for slot in slots],
    )
