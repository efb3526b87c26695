"""Records of the language-model stage."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TrainedLM:
    """Weights of a mini model.

    Attributes:
        state: every weight by its name.
        vocab_size: tokens of the task's vocabulary.
        n_positions: longest sequence.
        accuracy: on prompts that did not train it.
    """

    state: dict[str, Tensor]
    vocab_size: int
    n_positions: int
    accuracy: float
