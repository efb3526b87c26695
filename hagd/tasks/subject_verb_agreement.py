"""Subject–verb agreement across an attractor (Linzen et al. 2016, arXiv 1611.01368)."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from hagd.config.task import SubjectVerbAgreement
from hagd.errors import TaskError
from hagd.tasks.data_files import Record, read_records
from hagd.tasks.examples import Example, assemble, next_token_example
from hagd.tasks.records import TaskData
from hagd.tasks.splits import seeded, some_codes, split_codes, split_groups, split_sizes
from hagd.tasks.tokenise import Piece, aligned_words, encode, fill, first_token, single_token_words, slot_names, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = {"clean_prefix": str, "patch_prefix": str, "clean_answer": str, "patch_answer": str}
WITH_ATTRACTOR = "The {subject} {preposition} the {attractor}"
WITHOUT_ATTRACTOR = "The {subject} {adverb}"
SUBJECTS = words(
    "boy girl teacher doctor lawyer student friend farmer singer writer artist guard driver actor player soldier "
    "officer parent father mother brother sister king worker manager visitor customer child:children man:men "
    "woman:women"
)
ATTRACTORS = words("table chair car house tree book door window truck box bike desk dog bird tower garden wall lamp")
PREPOSITIONS = words("near behind beside above below by")
ADVERBS = words("probably clearly certainly also often usually still really always now")
SHIFTED_SUBJECTS = words(
    "nurse pilot neighbor guest judge chef uncle dancer hunter poet president engineer captain prince"
)
SHIFTED_ATTRACTORS = words("clock bridge gate wheel boat cup hat lake forest hill coin shelf:shelves")
SHIFTED_PREPOSITIONS = words("beneath inside outside past around")
SHIFTED_ADVERBS = words("rarely never sometimes maybe perhaps then soon surely")
VERBS = (("is", "are"), ("has", "have"), ("does", "do"), ("goes", "go"), ("was", "were"))
"""Singular and plural."""


def build(config: SubjectVerbAgreement, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Right when the verbs of the subject's number are together more probable than those of the other.

    The counterfactual is the sentence with the subject in the other number; the two never fall into different
    splits. Without `data_files` three quarters of the generated prompts have an attractor (a second noun, of
    either number, before the verb) and the others an adverb. Chance is 1/2.

    Raises:
        TaskError: too few words are single tokens, too few distinct prompts exist, or a file is malformed.
    """
    if config.data_files:
        splits = _from_files(config, tokenizer, seed)
    else:
        splits = _generated(config.name, tokenizer, seed, _WORDS, split_sizes(config))
    return assemble(name=config.name, splits=splits, accuracy="pairwise", chance=0.5)


def build_shifted(config: SubjectVerbAgreement, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """As many generated prompts as for validation, if there are, of words that are in no split."""
    sizes = {"validation": config.n_validation}
    return _generated(config.name, tokenizer, seed, _SHIFTED_WORDS, sizes, fewer=True)["validation"]


@dataclass(frozen=True)
class _Words:
    subjects: Sequence[str]
    attractors: Sequence[str]
    prepositions: Sequence[str]
    adverbs: Sequence[str]


_WORDS = _Words(SUBJECTS, ATTRACTORS, PREPOSITIONS, ADVERBS)
_SHIFTED_WORDS = _Words(SHIFTED_SUBJECTS, SHIFTED_ATTRACTORS, SHIFTED_PREPOSITIONS, SHIFTED_ADVERBS)


def _generated(
    name: str, tokenizer: PreTrainedTokenizerBase, seed: int, words: _Words, sizes: dict[str, int], fewer: bool = False
) -> dict[str, list[Example]]:
    """Slots: t1 (The), subject, preposition, t2 (the), last (attractor or adverb).

    With `fewer` the size, of one split alone, is an upper bound.
    """
    writer, generator = _Writer.of(name, tokenizer, words), seeded(seed)
    plain = {split: size // 4 for split, size in sizes.items()}
    attracted = {split: size - plain[split] for split, size in sizes.items()}
    splits: dict[str, list[Example]] = {split: [] for split in sizes}
    kinds: tuple[tuple[dict[str, int], tuple[int, ...], Callable[[list[int]], Example]], ...] = (
        (attracted, writer.radices_with_attractor, writer.with_attractor),
        (plain, writer.radices_without_attractor, writer.without_attractor),
    )
    for wanted, radices, make in kinds:
        codes = (
            {split: some_codes(size, radices, generator) for split, size in wanted.items()}
            if fewer
            else split_codes(wanted, radices, "give sentences with task.data_files=…", generator)
        )
        for split, rows in codes.items():
            numbers = torch.randint(2, (len(rows), 1), generator=generator)
            splits[split] += [make(row) for row in torch.cat([rows, numbers], dim=1).tolist()]
    for split, examples in splits.items():  # the first prompts of a split are a sample of it
        random.Random(f"{seed} {split}").shuffle(examples)
    return splits


@dataclass(frozen=True)
class _Writer:
    """Writes a prompt for each row of digits, the last of which is the subject's number."""

    tokenizer: PreTrainedTokenizerBase
    subjects: Sequence[tuple[str, str]]
    attractors: Sequence[tuple[str, str]]
    prepositions: Sequence[str]
    adverbs: Sequence[str]
    verbs: Sequence[tuple[int, ...]]

    @classmethod
    def of(cls, name: str, tokenizer: PreTrainedTokenizerBase, words: _Words) -> _Writer:
        subjects, attractors = (_both_numbers(tokenizer, nouns) for nouns in (words.subjects, words.attractors))
        lists = {"prepositions": words.prepositions, "adverbs": words.adverbs}
        kept = aligned_words(tokenizer, name, lists, at_least=1)
        if not subjects or not attractors:
            raise TaskError(
                f"task={name}: the model's tokenizer has no subject or attractor as a single token in both numbers "
                "(task.data_files=… can give other sentences)"
            )
        verbs = [tuple(first_token(tokenizer, f" {verb[number]}") for verb in VERBS) for number in (0, 1)]
        return cls(tokenizer, subjects, attractors, **kept, verbs=verbs)

    @property
    def radices_with_attractor(self) -> tuple[int, ...]:
        return (len(self.subjects), len(self.prepositions), len(self.attractors), 2)

    @property
    def radices_without_attractor(self) -> tuple[int, ...]:
        return (len(self.subjects), len(self.adverbs))

    def with_attractor(self, row: list[int]) -> Example:
        subject, preposition, attractor, attractor_number, number = row
        others = {
            "preposition": self.prepositions[preposition],
            "attractor": self.attractors[attractor][attractor_number],
        }
        return self._example(WITH_ATTRACTOR, self.subjects[subject], others, number)

    def without_attractor(self, row: list[int]) -> Example:
        subject, adverb, number = row
        return self._example(WITHOUT_ATTRACTOR, self.subjects[subject], {"adverb": self.adverbs[adverb]}, number)

    def _example(self, template: str, subject: tuple[str, str], others: dict[str, str], number: int) -> Example:
        clean, other = (
            encode(self.tokenizer, fill(template, {"subject": subject[n], **others})) for n in (number, 1 - number)
        )
        slots = slot_names(clean, "last")
        return next_token_example(clean.tokens, other.tokens, slots, self.verbs[number], self.verbs[1 - number])


def _both_numbers(tokenizer: PreTrainedTokenizerBase, nouns: Sequence[str]) -> list[tuple[str, str]]:
    """(singular, plural) of the nouns that are one token in both; `man:men` gives an irregular plural."""
    pairs = []
    for noun in nouns:
        singular, _, plural = noun.partition(":")
        pair = (singular, plural or f"{singular}{'es' if singular.endswith('x') else 's'}")
        if len(single_token_words(tokenizer, pair)) == 2:
            pairs.append(pair)
    return pairs


def _from_files(
    config: SubjectVerbAgreement, tokenizer: PreTrainedTokenizerBase, seed: int
) -> dict[str, list[Example]]:
    """Slots: first, subject (where the two prefixes differ), before, after, last.

    Rows with the same prefix are one prompt that accepts each row's answer, with the first row's counterfactual.
    Prefixes that rows join, directly or over others, are never in different splits. Pairs of unequal token length are
    left out. Sizes are upper bounds; fewer prompts are divided in proportion.
    """
    assert config.data_files is not None
    groups = _joined(read_records(config.data_files, COLUMNS))
    random.Random(seed).shuffle(groups)

    def examples() -> Iterator[list[Example]]:
        for group in groups:
            found = [_from_rows(rows, tokenizer) for rows in group]
            usable = [example for example in found if example]
            if usable:
                yield usable

    return split_groups(examples(), split_sizes(config), f"task.data_files={config.data_files}")


def _joined(rows: list[Record]) -> list[list[list[Record]]]:
    """The rows of each clean prefix, in groups that have no prefix in common."""
    by_prefix: dict[str, list[Record]] = defaultdict(list)
    group: dict[str, dict[str, None]] = {}  # ordered sets, one shared by all prefixes in it
    for row in rows:
        by_prefix[row["clean_prefix"]].append(row)
        one, other = (group.setdefault(prefix, {prefix: None}) for prefix in (row["clean_prefix"], row["patch_prefix"]))
        if one is not other:
            large, small = (one, other) if len(one) >= len(other) else (other, one)
            large |= small
            group |= dict.fromkeys(small, large)
    distinct = {id(prefixes): prefixes for prefixes in group.values()}.values()
    return [[by_prefix[prefix] for prefix in prefixes if prefix in by_prefix] for prefixes in distinct]


def _from_rows(rows: list[Record], tokenizer: PreTrainedTokenizerBase) -> Example | None:
    clean, patch = (encode(tokenizer, [Piece(rows[0][column], "text")]) for column in ("clean_prefix", "patch_prefix"))
    changed = [i for i, pair in enumerate(zip(clean.tokens, patch.tokens, strict=False)) if pair[0] != pair[1]]
    answers, distractors = (
        [first_token(tokenizer, row[column]) for row in rows] for column in ("clean_answer", "patch_answer")
    )
    if len(clean) != len(patch) or not changed or set(answers) & set(distractors):
        return None
    names = ["before" if i < changed[0] else "after" for i in range(len(clean))]
    names[0], names[-1] = "first", "last"
    for i in changed:
        names[i] = "subject"
    return next_token_example(clean.tokens, patch.tokens, tuple(names), answers, distractors)
