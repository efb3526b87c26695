"""Text, tokenised and packed once, whose activations train transcoders beside the task's prompts."""

from __future__ import annotations

import glob
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from hagd.config.activations import Corpus
from hagd.disk import to_disk
from hagd.errors import ConfigError
from hagd.hub import hub_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TOKENS_FILE = "corpus.tokens"
STATE_FILE = "corpus.json"

_BLOCK = 1_000_000
"""Characters that are tokenised at a time, so that a small sample of a large file is quick and little is in memory."""

_LOCAL = "set transcoder.corpus.data_files to local text files (a path or a glob pattern)"


def corpus_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Consecutive tokens of the corpus, `[ceil(n_tokens / context), context]`, memory-mapped from a file in `folder`.

    Documents (rows of a hub data set that have text, or files in alphabetical order) follow each other, separated by
    the tokenizer's end-of-sequence token if it has one. Where the tokenizer puts a beginning-of-sequence token before a
    prompt (Llama, Gemma), every sequence begins with one, too, because models use it. Two or four bytes a token, by the
    size of the vocabulary. A call that was killed is continued by the next one; text that was tokenised is skipped.
    Several processes may share a folder.

    Args:
        corpus: the source.
        tokenizer: the model's.
        folder: for the file and its state; made when needed.
        progress: called with tokens done and to do.

    Raises:
        ConfigError: the source cannot be read, or it has too little text.
    """
    n_sequences = -(-corpus.n_tokens // corpus.context)
    wanted = n_sequences * corpus.context
    highest = max(tokenizer.get_vocab().values())
    dtype = np.dtype(np.uint16 if highest < 2**16 else np.uint32)
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "corpus.lock"):
        n_tokens = _tokenise_corpus(corpus, tokenizer, dtype, folder, wanted, progress)
    if n_tokens < wanted:
        raise ConfigError(
            f"transcoder.corpus.n_tokens={corpus.n_tokens}: needs {wanted} tokens of text (whole sequences of "
            f"{corpus.context}), found {n_tokens} in {corpus.data_files or corpus.dataset}; lower n_tokens or add text"
        )
    # Copy-on-write, because PyTorch wants memory that may be written to.
    return torch.from_numpy(np.memmap(folder / TOKENS_FILE, dtype, "c", shape=(n_sequences, corpus.context)))


def _tokenise_corpus(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    dtype: np.dtype[Any],
    folder: Path,
    wanted: int,
    progress: Callable[[int, int], None] | None,
) -> int:
    """Bring at least `wanted` tokens into the file, or all that there are; returns how many it has."""
    source = _identity(corpus, tokenizer)
    n_texts, n_tokens, checksum = _state(folder, source, dtype)
    if n_tokens >= wanted:
        return n_tokens
    texts, begin = islice(_texts(corpus), n_texts, None), first_of_prompts(tokenizer)
    with (folder / TOKENS_FILE).open("r+b" if n_tokens else "wb") as file:
        file.truncate(n_tokens * dtype.itemsize)
        file.seek(0, 2)
        for block in _blocks(texts):
            tokens = _tokenise(block, tokenizer, dtype)
            if begin is not None:
                tokens = _begun(tokens, n_tokens, corpus.context, begin)
            content = tokens.tobytes()
            file.write(content)
            file.flush()
            to_disk(folder / TOKENS_FILE)  # the state counts on it
            n_texts, n_tokens, checksum = n_texts + len(block), n_tokens + len(tokens), zlib.crc32(content, checksum)
            _save_state(folder, {"source": source, "texts": n_texts, "tokens": n_tokens, "crc32": checksum})
            if progress is not None:
                progress(min(n_tokens, wanted), wanted)
            if n_tokens >= wanted:
                break
    return n_tokens


def _tokenise(
    block: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase, dtype: np.dtype[Any]
) -> np.ndarray[Any, Any]:
    encoded = tokenizer(
        [text for text, _ in block],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]
    end = np.array([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id], dtype)
    pieces = []
    for ids, (_, ends_document) in zip(encoded, block, strict=True):
        pieces.append(np.array(ids, dtype))
        if ends_document:
            pieces.append(end)
    return np.concatenate(pieces)


def first_of_prompts(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, where the tokenizer puts it before a prompt."""
    first: int = tokenizer("a").input_ids[0]
    return first if first == tokenizer.bos_token_id else None


def _begun(tokens: np.ndarray[Any, Any], n_before: int, context: int, begin: int) -> np.ndarray[Any, Any]:
    """Text that follows `n_before` tokens of the file, with `begin` in the first column of every `context`."""
    to_next = -n_before % context  # tokens until then
    return np.insert(tokens, np.arange(to_next, len(tokens), context - 1), begin)


def _blocks(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    """The same texts, some `_BLOCK` characters at a time."""
    block: list[tuple[str, bool]] = []
    size = 0
    for text in texts:
        block.append(text)
        size += len(text[0])
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block


def _identity(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides the tokens; `n_tokens`, and `context` where sequences begin with none, decide how many there are."""
    begin = first_of_prompts(tokenizer)
    return {
        **corpus.model_dump(mode="json", exclude={"n_tokens", "context"}),
        "files": listing(corpus),
        "tokenizer": [type(tokenizer).__name__, len(tokenizer), tokenizer.eos_token_id],
        **({} if begin is None else {"begin": begin, "context": corpus.context}),
    }


def listing(corpus: Corpus) -> list[list[Any]]:
    """Local files of the corpus with their sizes and times, which change when the text does; none of a hub's data set.

    Raises:
        ConfigError: `data_files` names none.
    """
    files: list[Path] = []
    if corpus.data_files is not None:
        files = _files(corpus.data_files)
    elif corpus.dataset is not None:  # as a path, a hub name has none
        files = sorted(file for file in Path(corpus.dataset).rglob("*") if file.is_file())
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _state(folder: Path, source: dict[str, Any], dtype: np.dtype[Any]) -> tuple[int, int, int]:
    """Texts and tokens that the file in `folder` holds, and the CRC-32 of these; nothing if it is of another source or
    damaged."""
    try:
        state = json.loads((folder / STATE_FILE).read_text())
        found = int(state["texts"]), int(state["tokens"]), int(state["crc32"])
        if state.get("source") != source:
            return 0, 0, 0
        whole = _checksum(folder / TOKENS_FILE, found[1] * dtype.itemsize) == found[2]
    except FileNotFoundError:
        return 0, 0, 0
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s); the corpus is tokenised again", folder / STATE_FILE, error)
        return 0, 0, 0
    if not whole:
        log.warning("%s is damaged; the corpus is tokenised again", folder / TOKENS_FILE)
    return found if whole else (0, 0, 0)


def _checksum(path: Path, n_bytes: int) -> int:
    """CRC-32 of the first bytes of a file."""
    checksum = 0
    with path.open("rb") as file:
        while n_bytes and (piece := file.read(min(n_bytes, _BLOCK))):
            checksum, n_bytes = zlib.crc32(piece, checksum), n_bytes - len(piece)
    return checksum


def _save_state(folder: Path, state: dict[str, Any]) -> None:
    partial = folder / f"{STATE_FILE}.partial"
    partial.write_text(json.dumps(state))
    partial.replace(folder / STATE_FILE)


def _texts(corpus: Corpus) -> Iterator[tuple[str, bool]]:
    """Pieces of text, and whether a document ends with each."""
    if corpus.data_files is not None:
        yield from _file_texts(corpus.data_files)
    else:
        assert corpus.dataset is not None, "refused by the configuration"
        yield from _hub_texts(corpus, corpus.dataset)


def _files(pattern: str) -> list[Path]:
    paths = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        found = "a folder, not text files" if Path(pattern).expanduser().is_dir() else "no such file"
        raise ConfigError(
            f"transcoder.corpus.data_files={pattern}: {found}; give existing text files, those of a folder as "
            "'FOLDER/**/*.txt'"
        )
    return paths


def _file_texts(pattern: str) -> Iterator[tuple[str, bool]]:
    for path in _files(pattern):
        try:
            with path.open(encoding="utf-8") as file:
                while lines := file.readlines(_BLOCK):
                    yield "".join(lines), False
        except UnicodeDecodeError as error:
            raise ConfigError(
                f"transcoder.corpus.data_files={pattern}: {path.name} is no UTF-8 text ({error.reason} at byte "
                f"{error.start}); convert it or leave it out"
            ) from None
        yield "", True


def _hub_texts(corpus: Corpus, name: str) -> Iterator[tuple[str, bool]]:
    problem = None if Path(name).exists() else hub_problem()
    if problem:
        raise ConfigError(f"transcoder.corpus.dataset={name}: {problem}; check the network, or {_LOCAL}")
    from datasets import load_dataset

    try:
        for row in load_dataset(name, corpus.subset, split=corpus.split, streaming=True):
            if corpus.column not in row:
                raise ConfigError(
                    f"transcoder.corpus.column={corpus.column}: {name} has no such column; it has {', '.join(row)}"
                )
            text = row[corpus.column]
            if text is None:
                continue
            if not isinstance(text, str):
                raise ConfigError(
                    f"transcoder.corpus.column={corpus.column}: expected text, found {type(text).__name__} in {name}; "
                    f"choose a column that holds text, of {', '.join(row)}"
                )
            yield text, True
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises a type of its own for each way of failing
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            f"transcoder.corpus.dataset={name} (subset {corpus.subset}, split {corpus.split}): cannot be read "
            f"({type(error).__name__}: {reason}); check name, subset and split, or {_LOCAL}"
        ) from error
