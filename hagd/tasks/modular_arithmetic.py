"""Modular arithmetic: `a b =`, and the answer `a ∘ b mod p` is read at `=`."""

from __future__ import annotations

import functools
import operator
import string

import torch
from torch import Generator, Tensor

from hagd.config.task import ModularArithmetic
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.splits import partner_with_other_answer, seeded, split_codes, split_sizes
from hagd.tasks.symbolic import symbolic_prompts, symbolic_task

OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


def build(config: ModularArithmetic, seed: int) -> TaskData:
    """Tokens are the numbers `0 … p − 1` and `=` (token p); slots a, b, …, =.

    The counterfactual is another prompt of the same split with another answer, and the distractor that answer.
    Chance is `1 / p`.

    Raises:
        TaskError: fewer than the wanted number of distinct operand tuples.
    """
    generator = seeded(seed)
    fix = f"raise task.p={config.p} or task.n_operands={config.n_operands}"
    operands = split_codes(split_sizes(config), (config.p,) * config.n_operands, fix, generator)
    splits = {name: _prompts(config, numbers, name, generator) for name, numbers in operands.items()}
    names = string.ascii_lowercase
    if config.n_operands > len(names):
        slots = tuple(f"operand{i + 1}" for i in range(config.n_operands))
    else:
        slots = tuple(names[: config.n_operands])
    return symbolic_task(
        name=config.name,
        slot_names=(*slots, "="),
        chance=1 / config.p,
        vocabulary=(*map(str, range(config.p)), "="),
        splits=splits,
    )


def _prompts(config: ModularArithmetic, numbers: Tensor, split: str, generator: Generator) -> Prompts:
    apply = OPERATIONS[config.operation]
    # Reducing at every step keeps products of many operands within int64.
    answer = functools.reduce(lambda left, right: apply(left, right) % config.p, numbers.unbind(1))
    partner = partner_with_other_answer(answer, generator, split)
    tokens = torch.cat([numbers, torch.full((len(numbers), 1), config.p)], dim=1)
    return symbolic_prompts(
        tokens, tokens[partner], [config.n_operands], answers=answer[:, None], distractors=answer[partner][:, None]
    )
