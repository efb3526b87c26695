"""Prompts of other wordings: as well formed as those of the splits, in none of them, of slots that they have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedTokenizerBase

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
from hagd.tasks import subject_verb_agreement
from hagd.tasks.build import build_task, can_shift, shifted_prompts
from hagd.tasks.records import Prompts, TaskData

SIZES = {"n_discovery": 60, "n_selection": 20, "n_validation": 40}
TASKS = (
    IOI(**SIZES),
    GreaterThan(**SIZES),
    SubjectVerbAgreement(**SIZES),
    FactualRecall(**SIZES),
    FactualRecall(relation="language", **SIZES),
    FactualRecall(relation="continent", **SIZES),
)
of_task = pytest.mark.parametrize(
    "config", TASKS, ids=lambda config: f"{config.name}-{getattr(config, 'relation', '')}"
)


def built(config: TaskConfig, tokenizer: PreTrainedTokenizerBase, seed: int) -> tuple[TaskData, Prompts]:
    task = build_task(config, tokenizer, seed)
    shifted = shifted_prompts(config, tokenizer, seed, task.slot_names)
    assert shifted is not None
    return task, shifted


@of_task
@pytest.mark.parametrize("seed", [0, 3])
def test_they_are_well_formed_and_in_no_split(
    tokenizer: PreTrainedTokenizerBase, check_task: Callable[[TaskData], None], config: TaskConfig, seed: int
) -> None:
    task, shifted = built(config, tokenizer, seed)
    check_task(replace(task, validation=shifted))
    validated = {tuple(row) for row in task.validation.tokens[:, 0].tolist()}
    assert not validated & {tuple(row) for row in shifted.tokens[:, 0].tolist()}
    assert 10 <= len(shifted) <= config.n_validation
    again = shifted_prompts(config, tokenizer, seed, task.slot_names)
    assert again is not None and torch.equal(again.tokens, shifted.tokens)


@pytest.mark.parametrize("config", TASKS[:2], ids=lambda config: config.name)
def test_a_position_has_the_slot_that_it_has_in_the_splits(
    plain_tokenizer: PreTrainedTokenizerBase, config: TaskConfig
) -> None:
    task, shifted = built(config, plain_tokenizer, 0)
    layouts = {tuple(row) for row in task.discovery.slots[:, 0].tolist()}
    assert {tuple(row) for row in shifted.slots[:, 0].tolist()} <= layouts


def test_facts_are_those_of_no_other_split(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    config = FactualRecall(**SIZES)
    task, shifted = built(config, plain_tokenizer, 0)
    at = task.slot_names.index("subject")

    def subjects(*splits: Prompts) -> set[int]:
        return {token for split in splits for token in split.tokens[split.slots == at].tolist()}

    assert subjects(shifted) <= subjects(task.validation)
    assert not subjects(shifted) & subjects(task.discovery, task.selection)


def test_prompts_with_slots_that_the_task_lacks_are_left_out(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    task, shifted = built(TASKS[2], plain_tokenizer, 0)
    short = tuple(name for name in task.slot_names if name != "preposition")
    kept = shifted_prompts(TASKS[2], plain_tokenizer, 0, short)
    assert kept is not None and 0 < len(kept) < len(shifted)
    assert shifted_prompts(TASKS[2], plain_tokenizer, 0, ("subject",)) is None


def test_a_tokenizer_without_their_words_has_none(
    plain_tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hagd.tasks.greater_than.SHIFTED_NOUNS", ("qqq", "zzz"))
    task = build_task(TASKS[1], plain_tokenizer, 0)
    assert shifted_prompts(TASKS[1], plain_tokenizer, 0, task.slot_names) is None
    assert "validation.shift: not measured" in caplog.text and "nouns" in caplog.text


def test_there_are_fewer_where_a_tokenizer_knows_few_words(
    plain_tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = subject_verb_agreement._Words(("nurse", "pilot"), ("clock",), ("inside",), ("rarely",))
    monkeypatch.setattr(subject_verb_agreement, "_SHIFTED_WORDS", few)
    _, shifted = built(TASKS[2], plain_tokenizer, 0)
    # Two subjects, once with the adverb and twice with the attractor, which has either number.
    assert len({tuple(row) for row in shifted.tokens[:, 0].tolist()}) == len(shifted) == 6


def test_which_tasks_have_them() -> None:
    assert all(can_shift(config) for config in TASKS)
    files = [SubjectVerbAgreement(data_files="a"), FactualRecall(data_files="a"), WinoGrande(), HellaSwag()]
    assert not any(can_shift(config) for config in [*files, ModularArithmetic(), Parity(), Sorting()])
