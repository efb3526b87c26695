from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hagd.activations.corpus import corpus_tokens
from hagd.config.stages import Corpus
from hagd.errors import ConfigError

WORDS = ["<unk>", "<end>", "a", "b", "c", "d"]


def tokenizer(eos: str | None = "<end>") -> PreTrainedTokenizerFast:
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=built, unk_token="<unk>", eos_token=eos, model_max_length=3)


@pytest.fixture
def texts(tmp_path: Path) -> str:
    (tmp_path / "2.txt").write_text("c d\nc\n")
    (tmp_path / "1.txt").write_text("a b a b")
    (tmp_path / "notes.md").write_text("d d d d d d")
    return str(tmp_path / "*.txt")


def test_files_are_packed_in_order_with_separators(texts: str) -> None:
    packed = corpus_tokens(Corpus(data_files=texts, n_tokens=7, context=4), tokenizer())
    assert packed.tolist() == [[2, 3, 2, 3], [1, 4, 5, 4]]
    assert packed.dtype == torch.int64


def test_a_tokenizer_without_end_token_needs_none(texts: str) -> None:
    packed = corpus_tokens(Corpus(data_files=texts, n_tokens=6, context=3), tokenizer(eos=None))
    assert packed.tolist() == [[2, 3, 2], [3, 4, 5]]


def test_blocks_of_a_large_file_make_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hagd.activations.corpus._BLOCK", 5)
    (tmp_path / "long.txt").write_text("a b\nc\nd a\nb\n" * 3)
    packed = corpus_tokens(Corpus(data_files=str(tmp_path / "long.txt"), n_tokens=19, context=19), tokenizer())
    assert packed.tolist() == [[2, 3, 4, 5, 2, 3] * 3 + [1]]


def test_a_hub_data_set_in_a_local_folder_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "a b", "n": 1}\n{"body": "c d", "n": 2}\n')
    packed = corpus_tokens(Corpus(dataset=str(tmp_path), column="body", n_tokens=6, context=3), tokenizer())
    assert packed.tolist() == [[2, 3, 1], [4, 5, 1]]
    with pytest.raises(ConfigError, match=r"corpus.column=text: .* has no such column; it has body, n"):
        corpus_tokens(Corpus(dataset=str(tmp_path), n_tokens=6, context=3), tokenizer())
    with pytest.raises(ConfigError, match="split nothing"):
        corpus_tokens(Corpus(dataset=str(tmp_path), split="nothing", n_tokens=6, context=3), tokenizer())


def test_too_little_text_says_how_much_there_is(texts: str) -> None:
    with pytest.raises(ConfigError, match=r"n_tokens=100: needs 102 tokens .*of 6\), found 9 in"):
        corpus_tokens(Corpus(data_files=texts, n_tokens=100, context=6), tokenizer())


def test_sources_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "binary.txt").write_bytes(b"a b \xff\xfe")
    for corpus, message in [
        (Corpus(), "no source"),
        (Corpus(data_files=str(tmp_path / "none*")), "no such file"),
        (Corpus(data_files=str(tmp_path / "binary.txt")), "binary.txt is no UTF-8 text"),
        (Corpus(dataset="nobody/nothing"), "dataset=nobody/nothing: HF_HUB_OFFLINE is set; check the network"),
    ]:
        with pytest.raises(ConfigError, match=message):
            corpus_tokens(corpus, tokenizer())
