from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from hagd.activations import corpus as module
from hagd.activations.corpus import corpus_tokens
from hagd.activations.plan import Sequences
from hagd.config.activations import Corpus
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


def test_files_are_packed_in_order_with_separators(texts: str, tmp_path: Path) -> None:
    packed = corpus_tokens(Corpus(data_files=texts, n_tokens=7, context=4), tokenizer(), tmp_path / "work")
    assert packed.tolist() == [[2, 3, 2, 3], [1, 4, 5, 4]]
    assert packed.dtype == torch.uint16


def test_a_tokenizer_without_end_token_needs_none(texts: str, tmp_path: Path) -> None:
    packed = corpus_tokens(Corpus(data_files=texts, n_tokens=6, context=3), tokenizer(eos=None), tmp_path / "work")
    assert packed.tolist() == [[2, 3, 2], [3, 4, 5]]


def beginning() -> PreTrainedTokenizerFast:
    """Puts `<end>` before prompts, as Llama's its `<s>`."""
    built = tokenizer(eos=None)
    built.bos_token = "<end>"
    built.backend_tokenizer.post_processor = TemplateProcessing(single="<end> $A", special_tokens=[("<end>", 1)])
    return built


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_sequences_begin_as_prompts_do(texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr("hagd.activations.corpus._BLOCK", block)
    plain = corpus_tokens(Corpus(data_files=texts, n_tokens=7, context=7), tokenizer(eos=None), tmp_path / "plain")
    for context in (2, 3, 4, 7):
        wanted = 7 // (context - 1) * context
        corpus = Corpus(data_files=texts, n_tokens=wanted, context=context)
        packed = corpus_tokens(corpus, beginning(), tmp_path / "work")  # of another context: it is written again
        assert (packed[:, 0] == 1).all() and packed.shape == (7 // (context - 1), context)
        text = packed[:, 1:].flatten().tolist()
        assert text == plain.flatten().tolist()[: len(text)]


def test_blocks_of_a_large_file_make_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hagd.activations.corpus._BLOCK", 5)
    (tmp_path / "long.txt").write_text("a b\nc\nd a\nb\n" * 3)
    packed = corpus_tokens(
        Corpus(data_files=str(tmp_path / "long.txt"), n_tokens=19, context=19), tokenizer(), tmp_path / "work"
    )
    assert packed.tolist() == [[2, 3, 4, 5, 2, 3] * 3 + [1]]


def test_a_hub_data_set_in_a_local_folder_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"body": "a b", "n": 1}\n{"body": "c d", "n": 2}\n')
    packed = corpus_tokens(
        Corpus(dataset=str(tmp_path), column="body", n_tokens=6, context=3), tokenizer(), tmp_path / "work"
    )
    assert packed.tolist() == [[2, 3, 1], [4, 5, 1]]
    with pytest.raises(ConfigError, match=r"corpus.column=text: .* has no such column; it has body, n"):
        corpus_tokens(Corpus(dataset=str(tmp_path), n_tokens=6, context=3), tokenizer(), tmp_path / "work")
    with pytest.raises(ConfigError, match="split nothing"):
        corpus_tokens(
            Corpus(dataset=str(tmp_path), split="nothing", n_tokens=6, context=3), tokenizer(), tmp_path / "work"
        )


def test_a_local_data_set_that_changes_is_another_one(tmp_path: Path) -> None:
    corpus = Corpus(dataset=str(tmp_path / "data"), n_tokens=3, context=3)
    (tmp_path / "data").mkdir()
    for text, expected in (("a b", [[2, 3, 1]]), ("c d c", [[4, 5, 4]])):
        before = module.listing(corpus)
        (tmp_path / "data" / "train.jsonl").write_text(json.dumps({"text": text}))
        assert module.listing(corpus) != before
        assert corpus_tokens(corpus, tokenizer(), tmp_path / "work").tolist() == expected


def test_rows_without_text_are_left_out_and_other_values_refused(tmp_path: Path) -> None:
    rows = ['{"text": "a b", "n": [1]}', '{"text": null, "n": [2]}', '{"text": "c d", "n": [3]}']
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    corpus = Corpus(dataset=str(tmp_path), n_tokens=6, context=3)
    assert corpus_tokens(corpus, tokenizer(), tmp_path / "work").tolist() == [[2, 3, 1], [4, 5, 1]]
    with pytest.raises(ConfigError, match=r"corpus.column=n: expected text, found list .*of text, n$"):
        corpus_tokens(corpus.model_copy(update={"column": "n"}), tokenizer(), tmp_path / "work")


def test_tokens_are_on_the_disk_before_the_state_counts_them(
    texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a power cut a state must not vouch for tokens that were still on their way."""
    monkeypatch.setattr(module, "_BLOCK", 1)
    safe = 0
    to_disk, save_state = module.to_disk, module._save_state

    def wait(path: Path) -> None:
        nonlocal safe
        to_disk(path)
        safe = path.stat().st_size // 2

    def save(folder: Path, state: dict[str, Any]) -> None:
        assert 0 < state["tokens"] <= safe
        save_state(folder, state)

    monkeypatch.setattr(module, "to_disk", wait)
    monkeypatch.setattr(module, "_save_state", save)
    corpus_tokens(Corpus(data_files=texts, n_tokens=9, context=3), tokenizer(), tmp_path / "work")
    assert safe == 9


def test_too_little_text_says_how_much_there_is(texts: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"n_tokens=100: needs 102 tokens .*of 6\), found 9 in"):
        corpus_tokens(Corpus(data_files=texts, n_tokens=100, context=6), tokenizer(), tmp_path / "work")


def test_sources_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "binary.txt").write_bytes(b"a b \xff\xfe")
    for corpus, message in [
        (Corpus(data_files=str(tmp_path / "none*")), "no such file"),
        (Corpus(data_files=str(tmp_path)), r"a folder, not text files; .* 'FOLDER/\*\*/\*\.txt'"),
        (Corpus(data_files=str(tmp_path / "binary.txt")), "binary.txt is no UTF-8 text"),
        (Corpus(dataset="nobody/nothing"), "dataset=nobody/nothing: HF_HUB_OFFLINE is set; check the network"),
    ]:
        with pytest.raises(ConfigError, match=message):
            corpus_tokens(corpus, tokenizer(), tmp_path / "work")


def test_it_continues_where_it_was_killed(texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1)
    corpus = Corpus(data_files=texts, n_tokens=8, context=4)
    tokenised: list[str] = []
    original = module._tokenise

    def watched(block: list[tuple[str, bool]], *rest: Any) -> Any:
        tokenised.extend(text for text, _ in block)
        return original(block, *rest)

    def kill(done: int, total: int) -> None:
        assert total == 8
        if done >= 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "_tokenise", watched)
    with pytest.raises(KeyboardInterrupt):
        corpus_tokens(corpus, tokenizer(), tmp_path / "work", kill)
    with (tmp_path / "work" / module.TOKENS_FILE).open("ab") as file:
        file.write(b"\x05\x00\x05")  # written, but not yet in the state
    before = len(tokenised)
    packed = corpus_tokens(corpus, tokenizer(), tmp_path / "work")
    assert packed.tolist() == [[2, 3, 2, 3], [1, 4, 5, 4]]
    assert before > 0 and "a b a b" not in tokenised[before:]
    before = len(tokenised)
    assert torch.equal(corpus_tokens(corpus, tokenizer(), tmp_path / "work").long(), packed.long())
    assert len(tokenised) == before


@pytest.mark.parametrize("change", ["text", "tokenizer", "state", "tokens", "a token"])
def test_what_does_not_fit_is_tokenised_again(texts: str, tmp_path: Path, change: str) -> None:
    corpus = Corpus(data_files=texts, n_tokens=4, context=4)
    corpus_tokens(corpus, tokenizer(), tmp_path / "work")
    expected = [[2, 3, 2, 3]]
    match change:
        case "text":
            (tmp_path / "1.txt").write_text("d c b a")
            expected = [[5, 4, 3, 2]]
        case "tokenizer":
            (tmp_path / "1.txt").write_text("d")
            expected = [[5, 4, 5, 4]]
        case "state":
            (tmp_path / "work" / module.STATE_FILE).write_text("{")
        case "tokens":
            (tmp_path / "work" / module.TOKENS_FILE).write_bytes(b"")
        case "a token":
            file = tmp_path / "work" / module.TOKENS_FILE
            file.write_bytes(file.read_bytes().replace(b"\3", b"\4", 1))
    eos = None if change == "tokenizer" else "<end>"
    assert corpus_tokens(corpus, tokenizer(eos), tmp_path / "work").tolist() == expected


def test_more_of_the_same_text_goes_on(texts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 1)
    for n, expected in ((2, [[2, 3]]), (6, [[2, 3], [2, 3], [1, 4]]), (4, [[2, 3], [2, 3]])):
        packed = corpus_tokens(Corpus(data_files=texts, n_tokens=n, context=2), tokenizer(), tmp_path / "work")
        assert packed.tolist() == expected


def test_a_large_vocabulary_takes_four_bytes_a_token(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(2**16 + 1)}
    built = Tokenizer(models.WordLevel(words, unk_token="w0"))
    built.pre_tokenizer = pre_tokenizers.Whitespace()
    (tmp_path / "text.txt").write_text("w1 w65535 w65536 w2")
    packed = corpus_tokens(
        Corpus(data_files=str(tmp_path / "*.txt"), n_tokens=4, context=2),
        PreTrainedTokenizerFast(tokenizer_object=built),
        tmp_path / "work",
    )
    assert packed.dtype == torch.uint32 and packed.tolist() == [[1, 65535], [65536, 2]]
    tokens, keep = Sequences(packed).take(np.array([1]))
    assert tokens.tolist() == [[65536, 2]] and bool(keep.all())
