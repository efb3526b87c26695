"""WinoGrande (Sakaguchi et al. 2019, arXiv 1907.10641) with partial scoring (Trinh & Le 2018, arXiv 1806.02847)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hagd.config.task import WinoGrande
from hagd.errors import TaskError
from hagd.tasks.data_files import Record, load_rows
from hagd.tasks.examples import assemble
from hagd.tasks.multiple_choice import Item, choice_examples
from hagd.tasks.records import TaskData
from hagd.tasks.splits import split_groups, split_sizes
from hagd.tasks.tokenise import Encoded, Piece, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {"sentence": str, "option1": str, "option2": str, "answer": str}


def build(config: WinoGrande, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Each option fills the blank, and the rest of the sentence is scored by the sum of its log-probabilities.

    Slots: first, context, option (the name), continuation, last. Twin sentences (same names and beginning) stay
    in one split. Items longer than `max_length`, or whose rest is tokenised differently after the two names, are
    left out. Sizes are upper bounds; fewer items are divided in proportion. Chance is 1/2.

    Raises:
        TaskError: no data, malformed rows, or too few items.
    """
    rows = load_rows(config.data_files, config.dataset, config.subset, config.split, COLUMNS)
    twins: dict[object, list[Record]] = defaultdict(list)
    for number, row in enumerate(rows, start=1):
        _check(row, number)
        key = frozenset((row["option1"], row["option2"])), tuple(row["sentence"].split()[:3])
        twins[key].append(row)
    groups = list(twins.values())
    random.Random(seed).shuffle(groups)

    def items() -> Iterator[list[Item]]:
        for group in groups:
            found = [_item(row, tokenizer) for row in group]
            usable = [item for item in found if item and max(map(len, item.options)) <= config.max_length]
            if usable:
                yield usable

    source = f"task.data_files={config.data_files}" if config.data_files else f"task.dataset={config.dataset}"
    source += f" with at most task.max_length={config.max_length} tokens"
    splits = split_groups(items(), split_sizes(config), source)
    examples = {name: choice_examples(found, name) for name, found in splits.items()}
    return assemble(name=config.name, splits=examples, accuracy="choice", chance=0.5)


def _check(row: Record, number: int) -> None:
    if row["answer"] not in ("1", "2") or row["sentence"].count("_") != 1:
        raise TaskError(
            f"task=winogrande: row {number} must have answer 1 or 2 and one _ in its sentence, found answer "
            f"{row['answer']!r} and {row['sentence']!r}; use a labelled split"
        )


def _item(row: Record, tokenizer: PreTrainedTokenizerBase) -> Item | None:
    before, after = row["sentence"].split("_")
    names = (row["option1"], row["option2"]) if row["answer"] == "1" else (row["option2"], row["option1"])
    options = tuple(
        encode(tokenizer, [Piece(before, "context"), Piece(name, "option"), Piece(after, "continuation")])
        for name in names
    )
    rests = [_continuation(option) for option in options]
    return Item(options, "continuation") if rests[0] and rests[0] == rests[1] else None


def _continuation(option: Encoded) -> list[int]:
    return [token for token, role in zip(option.tokens, option.roles, strict=True) if role == "continuation"]
