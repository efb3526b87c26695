"""Parity of a bit string; the answer is read at the last bit."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hagd.config.task import Parity
from hagd.tasks.records import IGNORED, Prompts, TaskData
from hagd.tasks.splits import partner_with_other_answer, seeded, split_codes, split_sizes
from hagd.tasks.symbolic import symbolic_prompts, symbolic_task

VOCABULARY = ("0", "1", "even", "odd", "start")
EVEN, START = VOCABULARY.index("even"), VOCABULARY.index("start")


def build(config: Parity, seed: int) -> TaskData:
    """Tokens `start`, `0`, `1`, `even`, `odd`; slots start, bit1 … bitN; only the last position is scored.

    The start token lets rotary models count: without one the prefixes 1, 11, 111 look alike to attention.

    The counterfactual is a string of the same split whose answer, the distractor, is the other one.
    `running` targets train on the parity of every prefix; `final` ones on that of the whole string. Chance is 1/2.

    Raises:
        TaskError: fewer than the wanted number of distinct strings, or all of a split have the same parity.
    """
    generator = seeded(seed)
    fix = f"raise task.length={config.length}"
    strings = split_codes(split_sizes(config), (2,) * config.length, fix, generator)
    return symbolic_task(
        name=config.name,
        slot_names=("start", *(f"bit{i + 1}" for i in range(config.length))),
        chance=0.5,
        vocabulary=VOCABULARY,
        splits={name: _prompts(config, bits, name, generator) for name, bits in strings.items()},
    )


def _prompts(config: Parity, bits: Tensor, split: str, generator: Generator) -> Prompts:
    parity = bits.cumsum(dim=1) % 2
    labels = _behind_start(EVEN + parity, IGNORED)
    if config.targets == "final":
        labels[:, :-1] = IGNORED
    answer = parity[:, -1:]
    tokens = _behind_start(bits, START)
    return symbolic_prompts(
        tokens,
        tokens[partner_with_other_answer(answer[:, 0], generator, split)],
        [config.length],
        answers=EVEN + answer,
        distractors=EVEN + 1 - answer,
        labels=labels,
    )


def _behind_start(values: Tensor, first: int) -> Tensor:
    return torch.cat([torch.full((len(values), 1), first), values], dim=1)
