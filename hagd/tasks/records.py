"""Records of the task stage.

Shape legend: N prompts, C options a prompt, T token positions, A scored positions, K accepted tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

PADDING = -1
"""Marks unused entries of `slots`, `scored`, `answers` and `distractors`."""

IGNORED = -100
"""Positions without a training target, as `torch.nn.functional.cross_entropy` expects."""

AccuracyRule = Literal["argmax", "pairwise", "choice"]


@dataclass(frozen=True)
class Prompts:
    """Tokenised prompts of one split.

    A prompt has C options, each a token sequence. Next-token tasks have C = 1; multiple-choice tasks have
    one option per choice, **the correct one first**. Sequences are padded on the right, which a causal
    model never sees at an earlier position.

    Attributes:
        tokens: int64 `[N, C, T]`.
        counterfactual: int64 `[N, C, T]`, a prompt of the same token length with another answer; the source
            of `resample` ablation values.
        slots: int64 `[N, C, T]`, index into `TaskData.slot_names`, PADDING on padding.
        scored: int64 `[N, C, A]`, positions whose next-token logits are read, PADDING if unused.
        answers: int64 `[N, C, A, K]`, accepted tokens at each scored position, PADDING if unused. For
            multiple choice: the option's own tokens.
        distractors: int64 `[N, C, A, K]`, tokens that the logit difference is taken against; all PADDING
            for multiple choice.
        labels: int64 `[N, T]`, targets that train a mini model (IGNORED elsewhere); None for other tasks.
    """

    tokens: Tensor
    counterfactual: Tensor
    slots: Tensor
    scored: Tensor
    answers: Tensor
    distractors: Tensor
    labels: Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: Tensor | slice) -> Prompts:
        return replace(
            self,
            **{name: value[index] for name, value in vars(self).items() if value is not None},
        )

    def to(self, device: torch.device) -> Prompts:
        """The same prompts on another device."""
        return replace(self, **{name: value.to(device) for name, value in vars(self).items() if value is not None})

    def flat(self) -> Prompts:
        """Options as sequences of their own, without labels: every field `[N·C, …]`."""
        names = ("tokens", "counterfactual", "slots", "scored", "answers", "distractors")
        return Prompts(*(getattr(self, name).flatten(0, 1) for name in names))


@dataclass(frozen=True)
class TaskData:
    """A task, split.

    Attributes:
        name: as in the configuration.
        slot_names: position roles; one node means the same thing in every prompt.
        accuracy: `argmax` (most likely token accepted at every scored position), `pairwise` (answers more
            probable than distractors) or `choice` (correct option most likely).
        length_normalised: multiple choice: mean instead of sum of log-probabilities.
        chance: accuracy of a uniform guess.
        vocabulary: token texts of symbolic tasks; empty when a tokenizer has them.
        train: sequences that train mini models; None otherwise.
        discovery, selection, validation: disjoint splits.
        n_dropped: prompts that the full model got wrong and that were left out.
    """

    name: str
    slot_names: tuple[str, ...]
    accuracy: AccuracyRule
    length_normalised: bool
    chance: float
    vocabulary: tuple[str, ...]
    train: Prompts | None
    discovery: Prompts
    selection: Prompts
    validation: Prompts
    n_dropped: int = 0
