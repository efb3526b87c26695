from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from hagd.errors import TaskError
from hagd.tasks.tokenise import aligned_words, encode, fill, first_token, single_token_words, slot_names

TEMPLATE = "The {noun} lasted from the year {year} to"


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> list[str]:
    return [str(tokenizer.convert_ids_to_tokens(token)).strip("Ġ▁") for token in tokens]


def test_tokens_belong_to_the_piece_they_end_in(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(tokenizer, fill(TEMPLATE, {"noun": "war", "year": "17"}))
    owned = [(text, role) for text, role in zip(text_of(tokenizer, encoded.tokens), encoded.roles, strict=True) if role]
    front = [("<s>", "bos")] if tokenizer.bos_token else []
    assert owned == [*front, ("war", "noun"), ("1", "year"), ("7", "year")]


def test_the_end_token_is_dropped(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(tokenizer, fill(TEMPLATE, {"noun": "war", "year": "17"}))
    assert text_of(tokenizer, encoded.tokens)[-1] == "to"
    full = tokenizer("The war lasted from the year 17 to").input_ids
    assert full[: len(encoded)] == list(encoded.tokens)


def test_slots_of_a_fixed_structure(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(plain_tokenizer, fill(TEMPLATE, {"noun": "war", "year": "17"}))
    names = slot_names(encoded, "last")
    # the space before a number is a token of its own here, as in SmolLM2
    assert names == ("t1", "noun", "t2", "t3", "t4", "t5", "t6", "year1", "year2", "last")


def test_single_token_words(tokenizer: PreTrainedTokenizerBase) -> None:
    assert single_token_words(tokenizer, ["war", "17", "unheard-of", "siege"]) == ("war", "siege")


def test_first_token_is_that_of_running_text(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded = encode(tokenizer, fill(TEMPLATE, {"noun": "war", "year": "17"}))
    assert first_token(tokenizer, " war") == encoded.tokens[encoded.roles.index("noun")]


def test_a_tokenizer_without_the_words_is_refused(plain_tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(TaskError, match=r"task=ioi.*only 1 of 3 words for names.*2 are needed"):
        aligned_words(plain_tokenizer, "ioi", {"names": ["Mary", "Qwxyz", "Zzyzx"]}, at_least=2)
