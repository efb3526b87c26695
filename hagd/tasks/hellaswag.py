"""HellaSwag (Zellers et al. 2019, arXiv 1905.07830): which of four endings continues the text?"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from hagd.config.task import HellaSwag
from hagd.errors import TaskError
from hagd.tasks.data_files import Record, load_rows
from hagd.tasks.examples import assemble
from hagd.tasks.multiple_choice import Item, choice_examples
from hagd.tasks.records import TaskData
from hagd.tasks.splits import split_groups, split_sizes
from hagd.tasks.tokenise import Piece, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {
    "activity_label": str,
    "ctx": str,
    "endings": list,
    "label": object,
}  # published both as a number and as text
N_ENDINGS = 4


def build(config: HellaSwag, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Each ending is scored by the mean log-probability of its tokens.

    The prompt is `activity: context`, cleaned of wikiHow markup as in EleutherAI's evaluation harness, whose
    `acc_norm` divides by characters where we divide by tokens. Slots: first, context, option (the ending), last.
    Rows with the same context stay in one split. Items longer than `max_length` are left out. Sizes are upper
    bounds; fewer items are divided in proportion. Chance is 1/4.

    Raises:
        TaskError: no data, malformed rows, or too few items.
    """
    rows = load_rows(config.data_files, config.dataset, None, config.split, COLUMNS)
    contexts: dict[str, list[Record]] = {}
    for number, row in enumerate(rows, start=1):
        _check(row, number)
        contexts.setdefault(row["ctx"], []).append(row)
    groups = list(contexts.values())
    random.Random(seed).shuffle(groups)

    def items() -> Iterator[list[Item]]:
        for group in groups:
            found = [_item(row, tokenizer) for row in group]
            usable = [item for item in found if max(map(len, item.options)) <= config.max_length]
            if usable:
                yield usable

    source = f"task.data_files={config.data_files}" if config.data_files else f"task.dataset={config.dataset}"
    source += f" with at most task.max_length={config.max_length} tokens"
    splits = split_groups(items(), split_sizes(config), source)
    return assemble(
        name=config.name,
        splits={name: choice_examples(found, name) for name, found in splits.items()},
        accuracy="choice",
        chance=1 / N_ENDINGS,
        length_normalised=True,
    )


def _check(row: Record, number: int) -> None:
    texts = sum(isinstance(ending, str) for ending in row["endings"])
    if str(row["label"]) not in {str(i) for i in range(N_ENDINGS)} or not texts == len(row["endings"]) == N_ENDINGS:
        raise TaskError(
            f"task=hellaswag: row {number} must have {N_ENDINGS} endings and a label from 0 to {N_ENDINGS - 1}, found "
            f"{row['endings']!r} and {row['label']!r}; use a labelled split"
        )


def _item(row: Record, tokenizer: PreTrainedTokenizerBase) -> Item:
    context = _clean(f"{row['activity_label']}: {row['ctx']}")
    endings = [_clean(ending) for ending in row["endings"]]
    endings.insert(0, endings.pop(int(row["label"])))
    return Item(
        tuple(encode(tokenizer, [Piece(context, "context"), Piece(f" {e}", "option")]) for e in endings), "option"
    )


def _clean(text: str) -> str:
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
