"""What the stages of one prompt's graph compute: functions from records to one record."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from hagd.attribution.prompt.graph import build_prompt_graph
from hagd.attribution.prompt.logits import LogitTargets, difference, given, likely
from hagd.attribution.prompt.records import PromptGraph
from hagd.attribution.prompt.trace import Trace, trace
from hagd.config.run import StagesConfig
from hagd.config.stages import GraphConfig, LogitsConfig
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
    if transcoders.model != lm.name:
        raise ConfigError(f"transcoders: expected ones trained for model {lm.name}, found {transcoders.model}")
    ids = prompt_tokens(config.graph, lm, task.vocabulary)
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


def prompt_tokens(graph: GraphConfig, lm: LanguageModel, vocabulary: Sequence[str]) -> tuple[int, ...]:
    """Ids of the prompt's tokens: by the tokenizer, or words of the vocabulary that a mini model was trained on.

    Raises:
        ConfigError: a word is none of the vocabulary, there are too few tokens or more than the model was built for.
    """
    assert graph.prompt is not None
    if lm.tokenizer is not None:
        ids = encode(lm.tokenizer, (Piece(graph.prompt, None),)).tokens
    else:
        ids = tuple(_of_vocabulary(word, vocabulary, "graph.prompt") for word in graph.prompt.split())
    if not ids:
        raise ConfigError(f"graph.prompt: expected at least one token, found {graph.prompt!r}; set a text")
    if graph.skip_first and len(ids) == 1:
        raise ConfigError(
            "graph.skip_first: expected a prompt with a position beside the first, which has no features, found one "
            f"token ({graph.prompt!r}); lengthen graph.prompt or set graph.skip_first=false"
        )
    if len(ids) > lm.n_positions:
        raise ConfigError(
            f"graph.prompt: expected at most {lm.n_positions} tokens, which model {lm.name} was built for, found "
            f"{len(ids)}; shorten it"
        )
    return ids


def chosen_logits(config: LogitsConfig, lm: LanguageModel, run: Trace, vocabulary: Sequence[str]) -> LogitTargets:
    """The logit nodes.

    Raises:
        ConfigError: as `logit_tokens`.
    """
    tokens = logit_tokens(config, lm, vocabulary)
    if config.tokens is None:
        return likely(lm, run, config.most, config.probability)
    return given(lm, run, tokens) if config.minus is None else difference(lm, run, *tokens)


def logit_tokens(config: LogitsConfig, lm: LanguageModel, vocabulary: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens that are named, the one that is taken off last.

    Raises:
        ConfigError: a text is no single token, or two are the same one.
    """
    named = [("graph.logits.tokens", text) for text in config.tokens or ()]
    if config.minus is not None:
        named.append(("graph.logits.minus", config.minus))
    first: dict[int, str] = {}
    for key, text in named:
        token = _single_token(text, lm, vocabulary, key)
        if token in first:
            raise ConfigError(
                f"{key}: expected distinct tokens of model {lm.name}, found {first[token]!r} and {text!r}, which are "
                "the same one; name it once"
            )
        first[token] = text
    return tuple(first)


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
