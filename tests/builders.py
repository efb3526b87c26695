"""Tiny random models, dictionaries and prompts, for every test of the numerical core."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.config.load import load_config
from hagd.config.model import Architecture, MiniModel
from hagd.config.run import ExtractConfig, TrainConfig
from hagd.config.task import ModularArithmetic
from hagd.models.language_model import LanguageModel
from hagd.models.mini import build_mini
from hagd.patching.means import head_means, slot_means
from hagd.patching.patched_model import PatchedModel
from hagd.patching.records import HeadMeans, SlotMeans
from hagd.tasks.build import build_task
from hagd.tasks.records import PADDING, Prompts, TaskData
from hagd.transcoders.records import Transcoder, TranscoderSet
from tests.reference import features_of, heads_of, mean_by_slot

ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "gpt_neox", "llama")

VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {},
    "skip": {"skip": True},
    "thresholds": {"thresholds": True},
    "cross_layer": {"cross_layer": True},
    "everything": {"skip": True, "thresholds": True, "cross_layer": True},
}
"""Dictionaries that `random_transcoders` makes."""

VOCABULARY = 8
"""Seven numbers and `=`."""


def tiny_task() -> TaskData:
    """`a + b mod 7`: three slots of one token each, one accepted token, one distractor."""
    config = ModularArithmetic(p=7, n_train=20, n_discovery=13, n_selection=8, n_validation=8)
    return build_task(config, None, seed=0)


def random_model(
    architecture: Architecture = "gpt2", *, n_layers: int = 2, length: int = 3, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """16 wide, 4 heads (2 of keys in Llama), with random biases and gains, so that none is neutral."""
    config = MiniModel(
        name="tiny",
        architecture=architecture,
        n_layers=n_layers,
        d_model=16,
        n_heads=4,
        n_kv_heads=2 if architecture == "llama" else None,
        d_mlp=32,
    )
    lm = build_mini(config, VOCABULARY, length, seed=1)
    randomise(lm)
    lm.model.to(dtype)
    return lm


def randomise(lm: LanguageModel, seed: int = 2) -> None:
    """Weights that make attention, norms and MLPs all matter."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in lm.model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        with torch.no_grad():
            parameter.copy_(0.35 * noise if parameter.ndim > 1 else parameter + 0.3 * noise)


def random_transcoders(
    lm: LanguageModel,
    *,
    site: Site = "mlp",
    layers: tuple[int, ...] | None = None,
    m: int = 12,
    k: int = 4,
    skip: bool = False,
    thresholds: bool = False,
    cross_layer: bool = False,
    seed: int = 3,
    dtype: torch.dtype = torch.float32,
) -> TranscoderSet:
    """Untrained dictionaries: their errors are large.

    With `thresholds`, each feature has its own instead of k: most are positive, some 0 as ReLU's.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    d = lm.d_model
    chosen = tuple(range(lm.n_layers)) if layers is None else layers
    built = [
        Transcoder(layer, k, draw(m, d) / d**0.5, 0.2 * draw(m), 0.4 * draw(m, d), 0.1 * draw(d)) for layer in chosen
    ]
    for i, transcoder in enumerate(built):
        if skip:
            transcoder = replace(transcoder, W_skip=0.3 * draw(d, d))
        if thresholds:
            transcoder = replace(transcoder, k=None, threshold=0.5 * draw(m).clamp(min=0))
        if cross_layer:
            transcoder = replace(transcoder, W_later=tuple(0.3 * draw(m, d) for _ in chosen[i + 1 :]))
        built[i] = transcoder
    return TranscoderSet(lm.name, site, tuple(built), ())


def random_prompts(*, n: int = 5, c: int = 1, length: int = 6, n_slots: int = 3, seed: int = 4) -> Prompts:
    """Of unequal length, slots that several positions share, one or two scored positions.

    With one option: two answers and one distractor at each scored position. With several: each option's own tokens.
    """
    g = torch.Generator().manual_seed(seed)
    tokens, counterfactual = (torch.randint(VOCABULARY, (n, c, length), generator=g) for _ in range(2))
    slots = torch.randint(n_slots, (n, c, length), generator=g)
    scored = torch.full((n, c, 2), PADDING)
    answers, distractors = (torch.full((n, c, 2, 2), PADDING) for _ in range(2))
    for row in range(n):
        for option in range(c):
            used = int(torch.randint(3, length + 1, (1,), generator=g))
            slots[row, option, used:] = PADDING
            for i in range(1 + row % 2):
                scored[row, option, i] = used - 1 - i
                chosen = torch.randperm(VOCABULARY, generator=g)
                answers[row, option, i, : 2 if c == 1 else 1] = chosen[: 2 if c == 1 else 1]
                if c == 1:
                    distractors[row, option, i, 0] = chosen[2]
    return Prompts(tokens, counterfactual, slots, scored, answers, distractors)


def prompts_task(prompts: Prompts, n_slots: int = 3) -> TaskData:
    """A task whose splits are all `prompts`."""
    names = tuple(f"slot{i}" for i in range(n_slots))
    rule = "argmax" if prompts.tokens.shape[1] == 1 else "choice"
    return TaskData("random", names, rule, False, 0.0, (), None, prompts, prompts, prompts)


def patched_model(
    lm: LanguageModel,
    transcoders: TranscoderSet,
    prompts: Prompts,
    n_slots: int = 3,
    head_layers: tuple[int, ...] = (),
) -> PatchedModel:
    """With means over `prompts`."""
    heads = head_means(lm, head_layers, prompts, n_slots, batch=4) if head_layers else None
    return PatchedModel(lm, transcoders, slot_means(lm, transcoders, prompts, n_slots, batch=4), heads)


def patched_double(
    lm: LanguageModel,
    transcoders: TranscoderSet,
    prompts: Prompts,
    n_slots: int = 3,
    head_layers: tuple[int, ...] = (),
) -> PatchedModel:
    """The same for double precision, its means taken from the reference implementation."""
    f, errors = features_of(lm, transcoders, prompts.tokens.flatten(0, 1))
    slots = prompts.slots.flatten(0, 1)
    means = SlotMeans(*(mean_by_slot(x, slots, n_slots) for x in (f, errors, (f > 0).to(f.dtype))))
    if not head_layers:
        return PatchedModel(lm, transcoders, means)
    z = heads_of(lm, prompts.tokens.flatten(0, 1), head_layers)
    outputs = mean_by_slot(z.flatten(-2), slots, n_slots).unflatten(-1, z.shape[-2:])
    return PatchedModel(lm, transcoders, means, HeadMeans(head_layers, outputs))


def tiny_settings(runs: Path) -> dict[str, Any]:
    """The whole chain in seconds: a model of 25k weights that sorts pairs of symbols, 96 % right on held-out ones."""
    return {
        "seed": 0,
        "model": {"kind": "mini", "name": "tiny", "n_layers": 2, "d_model": 32, "n_heads": 2, "d_mlp": 64},
        "task": {
            "name": "sorting",
            "length": 2,
            "n_symbols": 12,
            "n_train": 70,
            "n_discovery": 24,
            "n_selection": 12,
            "n_validation": 20,
            "training": {
                "steps": 120,
                "batch_size": 64,
                "learning_rate": 0.01,
                "warmup_steps": 5,
                "weight_decay": 0.1,
                "target_accuracy": 0.9,
            },
        },
        "transcoder": {"k": 4, "expansion": 2, "steps": 60, "batch_size": 64, "fvu_warning": 1.0},
        "graph": {"ig_steps": 2, "edge_prompts": 4, "batch_size": 64},
        "search": {
            "n_nodes": 8,
            "sizes": [4, 8, 16],
            "gate_steps": 12,
            "gate_batch": 8,
            "traversal_budget": 40,
            "pruning_budget": 60,
        },
        "validation": {"n_random": 3, "n_bootstrap": 50, "n_subsets": 4},
        "tracking": {"mode": "disabled"},
        "paths": {"runs": str(runs)},
    }


def changed(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with values at dotted keys replaced."""
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in settings.items()}
    for key, value in changes.items():
        first, _, rest = key.partition(".")
        result[first] = changed(result.get(first, {}), {rest: value}) if rest else value
    return result


def tiny_extract(runs: Path, **changes: Any) -> ExtractConfig:
    """`tiny_settings`, validated; `search__n_nodes=4` sets `search.n_nodes`."""
    return load_config(ExtractConfig, changed(tiny_settings(runs), _dotted(changes)))


def tiny_train(runs: Path, **changes: Any) -> TrainConfig:
    """The same for `train.py`."""
    return load_config(TrainConfig, changed(tiny_settings(runs), _dotted(changes)))


def _dotted(changes: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in changes.items()}
