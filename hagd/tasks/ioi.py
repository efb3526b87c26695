"""Indirect object identification (Wang et al. 2022, arXiv 2211.00593)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hagd.config.task import IOI
from hagd.tasks.examples import Example, assemble, next_token_example
from hagd.tasks.records import TaskData
from hagd.tasks.splits import seeded, some_codes, split_codes, split_sizes
from hagd.tasks.tokenise import aligned_words, encode, fill, first_token, slot_names, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATES = (
    "When {first} and {second} went to the {place}, {S2} gave a {object} to",
    "After {first} and {second} went to the {place}, {S2} gave a {object} to",
    "When {first} and {second} came to the {place}, {S2} gave a {object} to",
    "After {first} and {second} came to the {place}, {S2} offered a {object} to",
    "While {first} and {second} stayed at the {place}, {S2} gave a {object} to",
    "While {first} and {second} sat in the {place}, {S2} gave a {object} to",
)
"""All of the same structure, so that a slot means the same in each."""

SHIFTED_TEMPLATES = (
    "Once {first} and {second} got to the {place}, {S2} handed a {object} to",
    "Because {first} and {second} met at the {place}, {S2} sold a {object} to",
    "Before {first} and {second} left for the {place}, {S2} passed a {object} to",
    "Since {first} and {second} lived near the {place}, {S2} brought a {object} to",
)
"""Of the same structure again, in no split."""

NAMES = words(
    "Mary John Tom James Dan Martin Amy Scott Paul Laura Mark Kate Sarah David Anna Jack Peter Emma Robert Lisa "
    "Michael Alice George Jane Henry Susan Thomas Rachel William Helen Charles Karen Daniel Julia Edward Linda "
    "Steven Maria Kevin Emily Simon Ruth Adam Claire"
)
PLACES = words("store garden restaurant school hospital office house station library museum park kitchen")
OBJECTS = words("ring drink book computer letter key phone camera ball present map ticket")


def build(config: IOI, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """The name that is not repeated completes the sentence; slots IO, S1, S2, place, object, end, t1, t2, ….

    The two names come in either order (ABBA, BABA). The counterfactual names the other person in S2, so that its
    answer, the distractor, is the subject; a prompt and its mirror image never both occur. Chance is that of a
    uniform draw from the tokenizer's vocabulary.

    Raises:
        TaskError: the tokenizer knows too few names as single tokens, or too few distinct prompts exist.
    """
    writer, generator = _Writer.of(config, tokenizer, TEMPLATES), seeded(seed)
    codes = split_codes(split_sizes(config), writer.radices, _FIX, generator)
    splits = {split: writer.examples(rows, generator) for split, rows in codes.items()}
    return assemble(name=config.name, splits=splits, accuracy="argmax", chance=1 / len(tokenizer))


def build_shifted(config: IOI, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """As many prompts as for validation, if there are, of `SHIFTED_TEMPLATES`."""
    writer, generator = _Writer.of(config, tokenizer, SHIFTED_TEMPLATES), seeded(seed)
    return writer.examples(some_codes(config.n_validation, writer.radices, generator), generator)


_FIX = "choose a model whose tokenizer knows more names"


@dataclass(frozen=True)
class _Writer:
    """Writes a prompt for each row of digits `[template, first, second, place, object]`."""

    tokenizer: PreTrainedTokenizerBase
    templates: Sequence[str]
    names: Sequence[str]
    places: Sequence[str]
    objects: Sequence[str]
    token_of: dict[str, int]

    @classmethod
    def of(cls, config: IOI, tokenizer: PreTrainedTokenizerBase, templates: Sequence[str]) -> _Writer:
        lists = {"names": NAMES, "places": PLACES, "objects": OBJECTS}
        kept = aligned_words(tokenizer, config.name, lists, at_least=4)
        token_of = {name: first_token(tokenizer, f" {name}") for name in kept["names"]}
        return cls(tokenizer, templates, **kept, token_of=token_of)

    @property
    def radices(self) -> tuple[int, ...]:
        n = len(self.names)
        return (len(self.templates), n, n - 1, len(self.places), len(self.objects))

    def examples(self, rows: Tensor, generator: torch.Generator) -> list[Example]:
        orders = torch.randint(2, (len(rows),), generator=generator).tolist()
        return [self._example(row, bool(order)) for row, order in zip(rows.tolist(), orders, strict=True)]

    def _example(self, code: list[int], subject_first: bool) -> Example:
        template, first, second, place, thing = code
        pair = (self.names[first], self.names[second + (second >= first)])
        subject, other = pair if subject_first else pair[::-1]
        text = self.templates[template].replace("{first}", "{S1}" if subject_first else "{IO}")
        text = text.replace("{second}", "{IO}" if subject_first else "{S1}")
        filled = {"S1": subject, "IO": other, "place": self.places[place], "object": self.objects[thing]}
        clean = encode(self.tokenizer, fill(text, {**filled, "S2": subject}))
        mirrored = encode(self.tokenizer, fill(text, {**filled, "S2": other}))
        answer, distractor = self.token_of[other], self.token_of[subject]
        return next_token_example(clean.tokens, mirrored.tokens, slot_names(clean, "end"), [answer], [distractor])
