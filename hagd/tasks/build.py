"""From a task's configuration to its prompts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
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
from hagd.tasks.examples import collate
from hagd.tasks.records import Prompts, TaskData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)


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


def can_shift(config: TaskConfig) -> bool:
    """Whether the task has prompts of wordings that are in none of its splits."""
    match config:
        case IOI() | GreaterThan():
            return True
        case SubjectVerbAgreement() | FactualRecall():
            return config.data_files is None
        case _:
            return False


def shifted_prompts(
    config: TaskConfig, tokenizer: PreTrainedTokenizerBase, seed: int, slot_names: Sequence[str]
) -> Prompts | None:
    """Prompts of other wordings than those of any split, up to as many as for validation.

    None, with a warning, where the tokenizer knows too few of their words.

    Args:
        config: of a task that `can_shift`.
        tokenizer: of the model.
        seed: decides which prompts are drawn.
        slot_names: of the task; prompts with another slot are left out, it has no ablation values.
    """
    try:
        match config:
            case IOI():
                examples = ioi.build_shifted(config, tokenizer, seed)
            case GreaterThan():
                examples = greater_than.build_shifted(config, tokenizer, seed)
            case SubjectVerbAgreement():
                examples = subject_verb_agreement.build_shifted(config, tokenizer, seed)
            case FactualRecall():
                examples = factual_recall.build_shifted(config, tokenizer, seed)
            case _:
                raise AssertionError(f"{config.name} has one wording")
    except TaskError as error:
        log.warning("validation.shift: not measured, the model's tokenizer knows too few other words: %s", error)
        return None
    known = [example for example in examples if all(slot in slot_names for option in example for slot in option.slots)]
    if not known:
        log.warning("validation.shift: not measured, the model's tokenizer cuts the other wordings into more tokens")
        return None
    return collate(known, slot_names)
