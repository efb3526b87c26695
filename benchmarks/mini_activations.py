"""A mini model on modular addition: trained here unless it is there, and its activations.

Shape legend: n tokens, N prompts, T positions, d = d_model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from affinities import pipeline
from captured import SITES, SitePlace, Subject, norm_limits, write
from rich.console import Console
from torch import Tensor

from hagd.activations.capture import capture
from hagd.models.language_model import LanguageModel
from hagd.tasks.records import Prompts, TaskData


def mini(cache: Path, name: str, n_train: int) -> Subject:
    """Model `name` of `conf/model` on the default task, with dictionaries of the default size.

    Dictionaries learn from what the pipeline gives them: training and discovery prompts, again and again in another
    order. They are chosen by the selection split and measured on the validation split.
    """
    stages = pipeline(0, [f"model={name}", f"paths.runs={cache.absolute()}"], Console(stderr=True))
    task: TaskData = stages.get("task")
    lm, options = stages.lm, stages.config.transcoder
    layers = tuple(reversed(range(lm.n_layers)))
    assert task.train is not None
    prompts = {
        "train": torch.cat([task.train.tokens, task.discovery.tokens])[:, 0],
        "selection": task.selection.tokens[:, 0],
        "heldout": task.validation.tokens[:, 0],
    }
    for place in (SitePlace(site, layer) for layer in layers for site in SITES):
        _capture(lm, cache, place, prompts, n_train)
    text, scored = _with_answers(task.validation)
    m = options.expansion * lm.d_model
    return Subject(name, cache, lm, text, scored, m, options.k, n_train, layers)


def _capture(lm: LanguageModel, cache: Path, place: SitePlace, prompts: Mapping[str, Tensor], n_train: int) -> None:
    sides = {
        split: [side[0].flatten(0, 1) for side in capture(lm, tokens, place.site, [place.layer])]
        for split, tokens in prompts.items()
    }
    limits = norm_limits(cache, place, sides["train"])
    sides["train"] = _again_and_again(sides["train"], n_train)
    for split, (x, y) in sides.items():
        write(cache, place, {split: len(x)}, (x, y), limits)


def _again_and_again(sides: list[Tensor], wanted: int) -> list[Tensor]:
    """Whole copies of the tokens `[n, d]`, the last one cut, so that there are `wanted`."""
    index = torch.arange(wanted) % len(sides[0])
    return [side[index] for side in sides]


def _with_answers(prompts: Prompts) -> tuple[Tensor, int]:
    """Prompts `[N, T + 1]` followed by their answers, and T, where those are."""
    tokens = torch.cat([prompts.tokens[:, 0], prompts.answers[:, 0, -1, :1]], dim=1)
    return tokens, tokens.shape[1] - 1
