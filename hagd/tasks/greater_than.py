"""Greater-than (Hanna et al. 2023, arXiv 2305.00586): a war ends after it began."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from hagd.config.task import GreaterThan
from hagd.errors import TaskError
from hagd.tasks.examples import Example, assemble, next_token_example
from hagd.tasks.records import TaskData
from hagd.tasks.splits import seeded, some_codes, split_codes, split_sizes
from hagd.tasks.tokenise import Encoded, aligned_words, encode, fill, slot_names, words

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "The {noun} lasted from the year {century}{year} to the year {end}"
SHIFTED_TEMPLATES = (
    "The {noun} ran from the year {century}{year} to the year {end}",
    "That {noun} lasted from the year {century}{year} until the year {end}",
    "Their {noun} continued from the year {century}{year} to the year {end}",
)
"""Of the same structure, in no split; nor are their nouns."""
SHIFTED_NOUNS = words("trip tour mission marriage career contract festival peace truce mandate contest journey")
NOUNS = words(
    "war conflict campaign dispute siege revolt rebellion crisis expedition voyage project study search program "
    "treaty alliance reign famine strike trial"
)
CENTURIES = tuple(str(century) for century in range(11, 20))
LOW = "01"
"""Year of the counterfactual, as in the paper: a start that rules out next to nothing."""


def build(config: GreaterThan, tokenizer: PreTrainedTokenizerBase, seed: int) -> TaskData:
    """Right when the years after the start are together more probable than the others.

    Tokenizers that cut 1732 into 17 and 32 (GPT-2) answer with a two-digit token: accepted are those above 32, and
    the rest distract. Tokenizers with a token a digit (SmolLM2, Llama 2) answer with the decade's digit: accepted
    are those above 3, and those below distract; 3 itself is neither, as 1739 is later and 1730 is not. Slots: noun,
    century, year (numbered where they have two tokens), t1, t2, …, last. The counterfactual starts in year 01.
    Chance is 1/2.

    Raises:
        TaskError: another way of cutting years, or too few distinct prompts.
    """
    writer = _Writer.of(config, tokenizer, (TEMPLATE,), NOUNS)
    codes = split_codes(split_sizes(config), writer.radices, _FIX, seeded(seed))
    splits = {split: writer.examples(rows) for split, rows in codes.items()}
    return assemble(name=config.name, splits=splits, accuracy="pairwise", chance=0.5)


def build_shifted(config: GreaterThan, tokenizer: PreTrainedTokenizerBase, seed: int) -> list[Example]:
    """As many prompts as for validation, if there are, of `SHIFTED_TEMPLATES` and `SHIFTED_NOUNS`."""
    writer = _Writer.of(config, tokenizer, SHIFTED_TEMPLATES, SHIFTED_NOUNS)
    return writer.examples(some_codes(config.n_validation, writer.radices, seeded(seed)))


_FIX = "choose a model whose tokenizer cuts more years alike"


@dataclass(frozen=True)
class _Writer:
    """Writes a prompt for each row of digits `[template, noun, start]`."""

    tokenizer: PreTrainedTokenizerBase
    templates: Sequence[str]
    nouns: Sequence[str]
    width: int
    starts: Sequence[tuple[str, str]]
    tokens: dict[str, int]

    @classmethod
    def of(
        cls, config: GreaterThan, tokenizer: PreTrainedTokenizerBase, templates: Sequence[str], nouns: Sequence[str]
    ) -> _Writer:
        known = aligned_words(tokenizer, config.name, {"nouns": nouns}, at_least=2)["nouns"]
        width, starts = _starts(tokenizer, known[0])
        return cls(tokenizer, templates, known, width, starts, _number_tokens(tokenizer, known[0], width))

    @property
    def radices(self) -> tuple[int, ...]:
        return (len(self.templates), len(self.nouns), len(self.starts))

    def examples(self, rows: Tensor) -> list[Example]:
        return [self._example(self.templates[t], self.nouns[n], *self.starts[start]) for t, n, start in rows.tolist()]

    def _example(self, template: str, noun: str, century: str, year: str) -> Example:
        clean = _prompt(self.tokenizer, template, noun, century, year)
        low = _prompt(self.tokenizer, template, noun, century, LOW)
        begin = year[: self.width]
        answers = [token for number, token in self.tokens.items() if number > begin]
        below: Callable[[str], bool] = begin.__gt__ if self.width == 1 else begin.__ge__
        distractors = [token for number, token in self.tokens.items() if below(number)]
        return next_token_example(clean.tokens, low.tokens, slot_names(clean, "last"), answers, distractors)


def _prompt(
    tokenizer: PreTrainedTokenizerBase, template: str, noun: str, century: str, year: str, more: str = ""
) -> Encoded:
    fields = {"noun": noun, "century": century, "year": year, "end": century + more}
    return encode(tokenizer, fill(template, fields))


def _starts(tokenizer: PreTrainedTokenizerBase, noun: str) -> tuple[int, list[tuple[str, str]]]:
    """Digits of an answer token, and the (century, year) that are cut like that and leave years on both sides."""
    found: dict[int, list[tuple[str, str]]] = {1: [], 2: []}
    for century in CENTURIES:
        for year in (f"{number:02d}" for number in range(2, 99)):
            roles = _prompt(tokenizer, TEMPLATE, noun, century, year).roles
            for width, starts in found.items():
                parts = 3 - width
                cut_alike = all(roles.count(role) == parts for role in ("century", "year", "end"))
                if cut_alike and (width == 2 or "0" < year[0] < "9"):
                    starts.append((century, year))
    width, starts = max(found.items(), key=lambda item: len(item[1]))
    # The counterfactual must be cut in the same way as the prompt it replaces.
    alike = {c for c in CENTURIES if _prompt(tokenizer, TEMPLATE, noun, c, LOW).roles.count("year") == 3 - width}
    starts = [(century, year) for century, year in starts if century in alike]
    if not starts:
        raise TaskError(
            "task=greater_than: the model's tokenizer cuts years neither into two-digit tokens nor into single digits; "
            "choose a model whose tokenizer does, such as GPT-2 or SmolLM2"
        )
    return width, starts


def _number_tokens(tokenizer: PreTrainedTokenizerBase, noun: str, width: int) -> dict[str, int]:
    """The token of each `width`-digit number that follows a century, from the first century that shows it."""
    tokens: dict[str, int] = {}
    for century in CENTURIES:
        prompt = _prompt(tokenizer, TEMPLATE, noun, century, LOW).tokens
        for number in (f"{i:0{width}d}" for i in range(10**width)):
            longer = _prompt(tokenizer, TEMPLATE, noun, century, LOW, more=number).tokens
            if longer[: len(prompt)] == prompt and len(longer) == len(prompt) + 1:
                tokens.setdefault(number, longer[-1])
    return dict(sorted(tokens.items()))
