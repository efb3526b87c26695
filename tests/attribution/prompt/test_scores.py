"""Terms of an attention score against the model's own patterns and against sources taken out of query and key."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.attribution.prompt.graph import build_prompt_graph, without_sources
from hagd.attribution.prompt.logits import likely
from hagd.attribution.prompt.records import BIAS
from hagd.attribution.prompt.scores import query_and_key
from hagd.attribution.records import FEATURE, HEAD, TOKEN
from hagd.config.model import Architecture
from hagd.config.stages import GraphConfig
from hagd.errors import ConfigError
from tests.attribution.prompt.cases import LENGTH, Case, random_case, removals
from tests.builders import ARCHITECTURES

HEADS = 4


def sides(case: Case, layer: int, head: int, query: int, key: int) -> tuple[Tensor, Tensor]:
    silent = without_sources(case.model, case.sources, case.transcoders, case.run.entering - case.run.embedding)
    heard = silent.attention_in[layer]
    return query_and_key(case.lm, case.model, case.sources, heard, layer, head, query, key)


def queries_and_keys(case: Case, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """By the attention's own modules, `[B, H, T, e]` of what it reads, `[B, T, d]`."""
    lm = case.lm
    attention: Any = lm.layers[layer].get_submodule(lm.adapter.attention)
    if lm.adapter.name == "gpt2":
        q, k, _ = attention.c_attn(x).split(lm.d_model, dim=2)
    elif lm.adapter.name == "gpt_neox":
        q, k, _ = attention.query_key_value(x).unflatten(2, (HEADS, 3, -1)).unbind(3)
    else:
        q, k = attention.q_proj(x), attention.k_proj(x)
    q, k = (y.reshape(*x.shape[:2], -1, lm.d_model // HEADS).transpose(1, 2) for y in (q, k))
    if lm.adapter.name != "gpt2":
        from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb

        rotary = lm.model.get_submodule(lm.adapter.backbone).rotary_emb
        q, k = apply_rotary_pos_emb(q, k, *rotary(x, torch.arange(x.shape[1])[None]))
    return q, k.repeat_interleave(HEADS // k.shape[1], dim=1)


@pytest.mark.parametrize(("architecture", "layer", "heads"), [*product(ARCHITECTURES, (0, 2), [(), (0, 1)])])
def test_terms_add_up_to_the_scores_of_the_models_own_pattern(
    architecture: Architecture, layer: int, heads: tuple[int, ...]
) -> None:
    case = random_case(architecture, "everything", head_layers=heads)
    for head in (0, HEADS - 1):
        pattern = case.run.patterns[layer][head, LENGTH - 1]
        scores = []
        for key in range(LENGTH):
            query, other = sides(case, layer, head, LENGTH - 1, key)
            scores.append((query.T @ other).sum())
        torch.testing.assert_close(torch.stack(scores).softmax(0), pattern, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("architecture", "heads"), [*product(ARCHITECTURES, [(), (0, 1)])])
def test_a_term_is_what_its_pair_of_sources_adds_to_the_frozen_score(
    architecture: Architecture, heads: tuple[int, ...]
) -> None:
    case = random_case(architecture, head_layers=heads)
    layer, head, at, to = 2, 1, 4, 2
    frozen = case.frozen
    norm = case.lm.layers[layer].get_submodule(case.lm.adapter.attention_norm)
    clean, moved = (
        frozen._normalise(norm, found.resid[layer - 1]) for found in (frozen.clean, frozen(*removals(case)))
    )
    (q, k), (q_moved, k_moved) = (queries_and_keys(case, layer, x) for x in (clean, moved))
    e = q.shape[-1]
    q_of, k_of = (q - q_moved)[:, head, at], (k - k_moved)[:, head, to]
    expected = q_of @ k_of.T / e**0.5
    query, key = sides(case, layer, head, at, to)
    terms = query.T @ key
    scale = expected.abs().max().item()
    assert scale > 1e-3
    torch.testing.assert_close(terms[:-1, :-1], expected, rtol=1e-5, atol=1e-6 * scale)
    of_heads = slice(case.sources.n_features, case.sources.n_inner)
    assert bool(heads) == bool((expected[of_heads].abs().sum() > 1e-3).item())
    torch.testing.assert_close(terms.sum(), q[0, head, at] @ k[0, head, to] / e**0.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("heads", [(), (0,)])
def test_the_record_names_both_ends(tmp_path: Any, heads: tuple[int, ...]) -> None:
    case = random_case("llama", head_layers=heads)
    asked = {"layer": 1, "head": 2, "key": 1, "pairs": 10_000}
    config = GraphConfig.model_validate({"scope": "prompt", "prompt": "any", "score": asked})
    logits = likely(case.lm, case.run, 3, 0.9)
    found = build_prompt_graph(case.lm, case.transcoders, case.run, logits, config, tmp_path).score
    assert found is not None and (found.query, found.key) == (LENGTH - 1, 1)
    query, key = sides(case, 1, 2, LENGTH - 1, 1)
    terms = query.T @ key
    assert found.score == pytest.approx(terms.sum().item()) and found.of_all == pytest.approx(1)
    assert found.terms.sum() == pytest.approx(found.score, abs=1e-4)
    assert (np.diff(np.abs(found.terms)) <= 0).all()
    ends = {tuple(end) for pair in found.ends.tolist() for end in pair}
    assert (BIAS,) * 4 in ends and {TOKEN, FEATURE, *([HEAD] * len(heads))} <= {end[0] for end in ends}
    assert (found.ends[:, 0, 2] <= LENGTH - 1).all() and (found.ends[np.abs(found.terms) > 1e-9][:, 1, 2] <= 1).all()


@pytest.mark.parametrize("wrong", [{"layer": 3}, {"head": 4}, {"query": 5}, {"query": 1, "key": 2}])
def test_a_score_that_does_not_exist_is_refused(tmp_path: Any, wrong: dict[str, int]) -> None:
    case = random_case("gpt2")
    config = GraphConfig.model_validate({"scope": "prompt", "prompt": "any", "score": wrong})
    with pytest.raises(ConfigError, match=r"graph\.score: expected a layer below 3, a head below 4"):
        build_prompt_graph(case.lm, case.transcoders, case.run, likely(case.lm, case.run, 3, 0.9), config, tmp_path)
