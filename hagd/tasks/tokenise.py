"""From text whose parts have roles to tokens that have slots."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hagd.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOS = "bos"
"""Role of the special tokens that a tokenizer puts first."""


def words(text: str) -> tuple[str, ...]:
    """A list of words, written as one text."""
    return tuple(text.split())


@dataclass(frozen=True)
class Piece:
    """A part of a prompt; `role` is None for the fixed text of a template."""

    text: str
    role: str | None


@dataclass(frozen=True)
class Encoded:
    """A tokenised prompt with the role of the piece that each token ends in."""

    tokens: tuple[int, ...]
    roles: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.tokens)


def fill(template: str, fields: Mapping[str, str]) -> tuple[Piece, ...]:
    """The pieces of a template such as `The capital of {subject} is`, with its `fields` filled in."""
    pieces = []
    for literal, role, _, _ in string.Formatter().parse(template):
        pieces.append(Piece(literal, None))
        if role is not None:
            pieces.append(Piece(fields[role], role))
    return tuple(piece for piece in pieces if piece.text)


def encode(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[Piece]) -> Encoded:
    """Tokenise the concatenated pieces as one text.

    A token belongs to the piece of its last character, because most tokenizers put a word's leading space into
    the word's token. Special tokens at the front are kept; those at the end, after which a model predicts no
    text, are dropped.

    Raises:
        TaskError: the tokenizer does not report character offsets.
    """
    if not tokenizer.is_fast:
        raise TaskError(
            f"model: tokenizer {type(tokenizer).__name__} reports no character offsets, which text tasks need to find "
            "slots; use a model with a fast tokenizer"
        )
    text = "".join(piece.text for piece in pieces)
    role_of = [piece.role for piece in pieces for _ in piece.text]
    batch = tokenizer(text, add_special_tokens=True, return_offsets_mapping=True, return_special_tokens_mask=True)
    special, offsets = batch["special_tokens_mask"], batch["offset_mapping"]
    end = len(special)
    while end and special[end - 1]:
        end -= 1
    roles = [BOS if special[i] else role_of[max(offsets[i][1] - 1, 0)] for i in range(end)]
    return Encoded(tuple(batch["input_ids"][:end]), tuple(roles))


def slot_names(encoded: Encoded, last: str) -> tuple[str, ...]:
    """A slot for each token of a prompt whose structure is fixed.

    Template tokens are t1, t2, …; a role of one token keeps its name and one of n tokens gives name1 … nameN; the
    final token, where the answer is read, is `last`.
    """
    counts, seen = Counter(encoded.roles), Counter[str | None]()
    names = []
    for role in encoded.roles:
        seen[role] += 1
        numbered = role is None or counts[role] > 1
        names.append(f"{role or 't'}{seen[role]}" if numbered else str(role))
    return (*names[:-1], last)


def first_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """The first token of `text`, which starts with a space, when it follows a word."""
    encoded = encode(tokenizer, (Piece("x", None), Piece(text, "text")))
    return encoded.tokens[encoded.roles.index("text")]


def single_token_words(tokenizer: PreTrainedTokenizerBase, candidates: Iterable[str]) -> tuple[str, ...]:
    """Those `candidates` that are one known token after a space."""
    kept = []
    for word in candidates:
        encoded = encode(tokenizer, (Piece("x ", None), Piece(word, "word")))
        ours = [token for token, role in zip(encoded.tokens, encoded.roles, strict=True) if role == "word"]
        if len(ours) == 1 and ours[0] != tokenizer.unk_token_id:
            kept.append(word)
    return tuple(kept)


def aligned_words(
    tokenizer: PreTrainedTokenizerBase, task: str, lists: Mapping[str, Sequence[str]], at_least: int
) -> dict[str, tuple[str, ...]]:
    """The words of each list that are one token, so that slots fall on the same positions in every prompt.

    Raises:
        TaskError: fewer than `at_least` words are left in a list (or than all of a shorter one).
    """
    kept = {name: single_token_words(tokenizer, candidates) for name, candidates in lists.items()}
    for name, found in kept.items():
        if len(found) < min(at_least, len(lists[name])):
            raise TaskError(
                f"task={task}: the model's tokenizer has only {len(found)} of {len(lists[name])} words for {name} as "
                f"single tokens, {at_least} are needed; choose another task or model"
            )
    return kept
