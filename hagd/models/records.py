"""Records of the language-model stage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
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


@dataclass(frozen=True)
class ModelSample:
    """Some weights of a model, which tell it from others of the same label.

    Attributes:
        path: folder or hub name that it was read from; empty: neither.
        values: `[n]` of `LanguageModel.weight_sample`.
    """

    path: str
    values: Tensor

    def fits(self, values: Tensor) -> bool:
        """Whether `values` `[n]` are of the same model; in another precision they may differ as its rounding does."""
        if self.values.shape != values.shape:
            return False
        if self.values.dtype == values.dtype:
            return torch.equal(self.values, values)
        # Beyond what bfloat16 rounds by, and float16 below its normal range.
        return torch.allclose(self.values.float(), values.float(), rtol=2**-8, atol=2**-24)
