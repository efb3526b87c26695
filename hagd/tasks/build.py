"""From a task's configuration to its prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hagd.config.task import (
    IOI,
    FactualRecall,
    GreaterThan,
    HellaSwag,
    ModularArithmetic,
    Parity,
    Sorting,
    SubjectVerbAgreement,
    TaskConfig,
    WinoGrande,
)
from hagd.errors import TaskError
from hagd.tasks import (
    factual_recall,
    greater_than,
    hellaswag,
    ioi,
    modular_arithmetic,
    parity,
    sorting,
    subject_verb_agreement,
    winogrande,
)
from hagd.tasks.records import TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_task(config: TaskConfig, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> TaskData:
    """The prompts of a task and their splits, the same for the same `config`, tokenizer and `seed`.

    Args:
        config: any task section.
        tokenizer: of the model, for text tasks; symbolic tasks bring their own vocabulary and ignore it.
        seed: decides which prompts are drawn and how they are split.

    Raises:
        TaskError: the task cannot be built: too few prompts, a tokenizer that is missing or does not fit, or
            unreadable data.
    """
    match config:
        case ModularArithmetic():
            return modular_arithmetic.build(config, seed)
        case Parity():
            return parity.build(config, seed)
        case Sorting():
            return sorting.build(config, seed)
    if tokenizer is None:
        raise TaskError(
            f"task={config.name} is made of text and needs a model with a tokenizer, found none; choose a pretrained "
            "model, or task=modular_addition, parity or sorting"
        )
    match config:
        case IOI():
            return ioi.build(config, tokenizer, seed)
        case GreaterThan():
            return greater_than.build(config, tokenizer, seed)
        case SubjectVerbAgreement():
            return subject_verb_agreement.build(config, tokenizer, seed)
        case FactualRecall():
            return factual_recall.build(config, tokenizer, seed)
        case WinoGrande():
            return winogrande.build(config, tokenizer, seed)
        case HellaSwag():
            return hellaswag.build(config, tokenizer, seed)
