"""What the stages of one prompt's graph compute: functions from records to one record."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hagd.attribution.prompt.graph import build_prompt_graph
from hagd.attribution.prompt.logits import LogitTargets, difference, given, likely
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.prompt.trace import Trace, trace
from hagd.config.run import StagesConfig
from hagd.config.stages import LogitsConfig
from hagd.errors import ConfigError
from hagd.hierarchy.records import Hierarchy
from hagd.models.language_model import LanguageModel
from hagd.pipeline.progress import StageProgress
from hagd.pipeline.stages import head_layers
from hagd.report.prompt.assemble import assemble_prompt
from hagd.report.prompt.records import PromptReport
from hagd.tasks.records import TaskData
from hagd.tasks.tokenise import Piece, encode
from hagd.transcoders.records import TranscoderSet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def explain_prompt(
    config: StagesConfig,
    lm: LanguageModel,
    task: TaskData,
    transcoders: TranscoderSet,
    work: Path,
    progress: StageProgress,
) -> PromptGraph:
    """Stage `prompt_graph`; `work` holds all edges until they are pruned, and none of an interrupted attempt.

    Raises:
        ConfigError: the prompt, a token or a layer does not exist for this model, or the prompt is too long for it.
    """
    assert config.graph.prompt is not None
    if transcoders.model != lm.name:
        raise ConfigError(f"transcoders: expected ones trained for model {lm.name}, found {transcoders.model}")
    ids = prompt_tokens(config.graph.prompt, lm.tokenizer, task.vocabulary)
    longest = getattr(lm.model.config, "max_position_embeddings", len(ids))
    if len(ids) > longest:
        raise ConfigError(
            f"graph.prompt: expected at most {longest} tokens, which model {lm.name} was built for, found {len(ids)}; "
            "shorten it"
        )
    run = trace(lm, torch.tensor(ids, device=lm.device), head_layers(config.graph, lm, transcoders.layers))
    logits = chosen_logits(config.graph.logits, lm, run, task.vocabulary)
    edges = work / "edges"
    try:
        return build_prompt_graph(
            lm,
            transcoders.to(lm.device),
            run,
            logits,
            config.graph,
            edges,
            lambda d, t: progress.part("edges", d, t),
        )
    finally:
        shutil.rmtree(edges, ignore_errors=True)


def report_prompt(
    config: StagesConfig,
    lm: LanguageModel,
    task: TaskData,
    transcoders: TranscoderSet,
    graph: PromptGraph,
    hierarchy: Hierarchy,
) -> PromptReport:
    """Stage `prompt_report`."""
    text: Callable[[int], str] = task.vocabulary.__getitem__ if task.vocabulary else lm.token_text
    return assemble_prompt(config, lm, transcoders.to(lm.device), graph, hierarchy, text)


def prompt_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase | None, vocabulary: Sequence[str]) -> tuple[int, ...]:
    """Ids of the prompt's tokens: by the tokenizer, or words of the vocabulary that a mini model was trained on.

    Raises:
        ConfigError: a word is none of the vocabulary.
    """
    if tokenizer is not None:
        return encode(tokenizer, (Piece(prompt, None),)).tokens
    return tuple(_of_vocabulary(word, vocabulary, "graph.prompt") for word in prompt.split())


def chosen_logits(config: LogitsConfig, lm: LanguageModel, run: Trace, vocabulary: Sequence[str]) -> LogitTargets:
    """The logit nodes.

    Raises:
        ConfigError: a text is no single token.
    """
    if config.tokens is None:
        return likely(lm, run, config.most, config.probability)
    tokens = [_single_token(text, lm, vocabulary, "graph.logits.tokens") for text in config.tokens]
    if config.minus is None:
        return given(lm, run, tokens)
    return difference(lm, run, tokens[0], _single_token(config.minus, lm, vocabulary, "graph.logits.minus"))


def _single_token(text: str, lm: LanguageModel, vocabulary: Sequence[str], key: str) -> int:
    if lm.tokenizer is None:
        return _of_vocabulary(text, vocabulary, key)
    ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        parts = [lm.token_text(i) for i in ids]
        raise ConfigError(
            f"{key}: expected the text of one token of model {lm.name}, found {text!r}, which is {parts}; most words "
            f"start with a space, as in ' {text.strip()}'"
        )
    return int(ids[0])


def _of_vocabulary(word: str, vocabulary: Sequence[str], key: str) -> int:
    if word not in vocabulary:
        shown = " ".join(vocabulary[:20]) + (" …" if len(vocabulary) > 20 else "")
        raise ConfigError(f"{key}: expected words of the task's vocabulary ({shown}), found {word!r}; correct it")
    return list(vocabulary).index(word)
