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
    """Some weights of a model, which tell it from others, whatever it is called and wherever it lies.

    Attributes:
        path: where the hub has it, with the revision; empty for folders, whose place says nothing to others.
        values: `[n]` of `LanguageModel.weight_sample`.
    """

    path: str
    values: Tensor

    def fits(self, values: Tensor) -> bool:
        """Whether `values` `[n]` are of the same model; in another precision, once they are rounded to the lower."""
        if self.values.shape != values.shape:
            return False
        lower = values.dtype if self.values.dtype == torch.float32 else self.values.dtype
        if values.dtype in (torch.float32, lower):
            return torch.equal(self.values.to(lower), values.to(lower))
        # Two roundings of one value: beyond what bfloat16 rounds by, and float16 below its normal range.
        return torch.allclose(self.values.float(), values.float(), rtol=2**-8, atol=2**-24)
