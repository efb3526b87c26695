"""Text, tokenised and packed, whose activations train transcoders beside the task's prompts."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hagd.config.stages import Corpus
from hagd.errors import ConfigError
from hagd.hub import hub_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BLOCK = 1_000_000
"""Characters of a file that are tokenised at a time, so that a small sample of a large file is quick."""

_LOCAL = "set transcoder.corpus.data_files to local text files (a path or a glob pattern)"


def corpus_tokens(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Consecutive tokens of the corpus, int64 `[ceil(n_tokens / context), context]`.

    Documents (rows of a hub data set, or files in alphabetical order) follow each other, separated by the
    tokenizer's end-of-sequence token if it has one; no other special token is added.

    Raises:
        ConfigError: no source is configured, it cannot be read, or it has too little text.
    """
    n_sequences = -(-corpus.n_tokens // corpus.context)
    wanted = n_sequences * corpus.context
    tokens: list[int] = []
    for text, ends_document in _texts(corpus):
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if ends_document and tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
        if len(tokens) >= wanted:
            return torch.tensor(tokens[:wanted]).view(n_sequences, corpus.context)
    raise ConfigError(
        f"transcoder.corpus.n_tokens={corpus.n_tokens}: needs {wanted} tokens of text (whole sequences of "
        f"{corpus.context}), found {len(tokens)} in {corpus.data_files or corpus.dataset}; lower n_tokens or add text"
    )


def _texts(corpus: Corpus) -> Iterator[tuple[str, bool]]:
    """Pieces of text, and whether a document ends with each."""
    if corpus.data_files is not None:
        yield from _file_texts(corpus.data_files)
    elif corpus.dataset is not None:
        yield from _hub_texts(corpus, corpus.dataset)
    else:
        raise ConfigError(f"transcoder.corpus: no source; set transcoder.corpus.dataset to a hub name, or {_LOCAL}")


def _file_texts(pattern: str) -> Iterator[tuple[str, bool]]:
    paths = [Path(name) for name in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    paths = [path for path in paths if path.is_file()]
    if not paths:
        raise ConfigError(f"transcoder.corpus.data_files={pattern}: no such file; give existing text files")
    for path in paths:
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
            yield str(row[corpus.column]), True
    except ConfigError:
        raise
    except Exception as error:  # the hub client raises a type of its own for each way of failing
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            f"transcoder.corpus.dataset={name} (subset {corpus.subset}, split {corpus.split}): cannot be read "
            f"({type(error).__name__}: {reason}); check name, subset and split, or {_LOCAL}"
        ) from error
