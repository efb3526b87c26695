"""Parity of a bit string; the answer is read at the last bit."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from hagd.config.task import Parity
from hagd.tasks.records import IGNORED, Prompts, TaskData
from hagd.tasks.splits import seeded, split_codes, split_sizes
from hagd.tasks.symbolic import symbolic_prompts, symbolic_task

VOCABULARY = ("0", "1", "even", "odd")
EVEN = VOCABULARY.index("even")


def build(config: Parity, seed: int) -> TaskData:
    """Tokens `0`, `1`, `even`, `odd`; slots bit1 … bitN; only the last position is scored.

    The counterfactual flips an odd number of random bits, so its answer, the distractor, is the other one.
    `running` targets train on the parity of every prefix; `final` ones on that of the whole string. Chance is 1/2.

    Raises:
        TaskError: fewer than the wanted number of distinct strings.
    """
    generator = seeded(seed)
    fix = f"raise task.length={config.length}"
    strings = split_codes(split_sizes(config), (2,) * config.length, fix, generator)
    return symbolic_task(
        name=config.name,
        slot_names=tuple(f"bit{i + 1}" for i in range(config.length)),
        chance=0.5,
        vocabulary=VOCABULARY,
        splits={name: _prompts(config, bits, generator) for name, bits in strings.items()},
    )


def _prompts(config: Parity, bits: Tensor, generator: Generator) -> Prompts:
    parity = bits.cumsum(dim=1) % 2
    labels = EVEN + parity
    if config.targets == "final":
        labels[:, :-1] = IGNORED
    answer = parity[:, -1:]
    return symbolic_prompts(
        bits,
        bits ^ _odd_flips(bits.shape, generator),
        [config.length - 1],
        answers=EVEN + answer,
        distractors=EVEN + 1 - answer,
        labels=labels,
    )


def _odd_flips(shape: torch.Size, generator: Generator) -> Tensor:
    n, length = shape
    n_flips = 2 * torch.randint((length + 1) // 2, (n, 1), generator=generator) + 1
    rank = torch.rand(n, length, generator=generator).argsort(dim=1)
    return (rank < n_flips).long()
