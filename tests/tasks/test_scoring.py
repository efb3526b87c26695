"""The vectorised scores against loops that follow the definitions word by word."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hagd.tasks.records import PADDING, Prompts
from hagd.tasks.scoring import is_correct, log_probability, logit_difference


def random_case(seed: int, options: int) -> tuple[Tensor, Prompts]:
    g = torch.Generator().manual_seed(seed)
    n, a, k, v = 5, 3, 4, 11
    logits = 2 * torch.randn(n, options, a, v, generator=g, dtype=torch.float64)
    scored = torch.randint(0, 9, (n, options, a), generator=g)
    answers, distractors = (torch.full((n, options, a, k), PADDING) for _ in range(2))
    for row in range(n):
        for option in range(options):
            n_scored = int(torch.randint(1, a + 1, (1,), generator=g))
            scored[row, option, n_scored:] = PADDING
            for position in range(n_scored):
                tokens = torch.randperm(v, generator=g)
                n_right = 1 if options > 1 else int(torch.randint(1, k + 1, (1,), generator=g))
                n_wrong = 0 if options > 1 else int(torch.randint(1, k + 1, (1,), generator=g))
                answers[row, option, position, :n_right] = tokens[:n_right]
                distractors[row, option, position, :n_wrong] = tokens[n_right : n_right + n_wrong]
    tokens = torch.zeros(n, options, 9, dtype=torch.int64)
    return logits, Prompts(tokens, tokens, tokens, scored, answers, distractors)


def used(tokens: Tensor) -> list[int]:
    return [token for token in tokens.tolist() if token != PADDING]


def log_sum(row: Tensor, tokens: list[int]) -> float:
    return math.log(sum(math.exp(row[token].item()) for token in tokens))


def slow(logits: Tensor, prompts: Prompts, row: int, normalised: bool) -> dict[str, float | bool]:
    everything = list(range(logits.shape[-1]))
    per_option = []
    for option in range(logits.shape[1]):
        positions = []
        for position, place in enumerate(prompts.scored[row, option].tolist()):
            if place != PADDING:
                values = logits[row, option, position]
                right = used(prompts.answers[row, option, position])
                wrong = used(prompts.distractors[row, option, position])
                positions.append((values, right, wrong))
        per_option.append(positions)
    if logits.shape[1] == 1:
        positions = per_option[0]
        leads = [log_sum(values, right) - log_sum(values, wrong) for values, right, wrong in positions]
        log_p = [log_sum(values, right) - log_sum(values, everything) for values, right, _ in positions]
        return {
            "difference": sum(leads) / len(leads),
            "log_p": sum(log_p) / len(log_p),
            "argmax": all(max(everything, key=lambda t: v[t].item()) in right for v, right, _ in positions),
            "pairwise": all(lead > 0 for lead in leads),
        }
    scores = [sum(log_sum(v, right) - log_sum(v, everything) for v, right, _ in found) for found in per_option]
    if normalised:
        scores = [score / len(found) for score, found in zip(scores, per_option, strict=True)]
    return {
        "difference": scores[0] - max(scores[1:]),
        "log_p": scores[0] - math.log(sum(math.exp(score) for score in scores)),
        "choice": scores[0] > max(scores[1:]),
    }


@given(seed=st.integers(0, 10_000), options=st.sampled_from([1, 2, 4]), normalised=st.booleans())
@settings(max_examples=60, deadline=None)
def test_agrees_with_loops(seed: int, options: int, normalised: bool) -> None:
    logits, prompts = random_case(seed, options)
    expected = [slow(logits, prompts, row, normalised) for row in range(len(prompts))]
    found = {
        "difference": logit_difference(logits, prompts, normalised),
        "log_p": log_probability(logits, prompts, normalised),
    }
    for name, values in found.items():
        torch.testing.assert_close(values, torch.tensor([e[name] for e in expected], dtype=torch.float64))
    for rule in ("argmax", "pairwise") if options == 1 else ("choice",):
        correct = is_correct(logits, prompts, rule, normalised)
        assert correct.tolist() == [e[rule] for e in expected]


@pytest.mark.parametrize("options", [1, 3])
@pytest.mark.parametrize("score", [logit_difference, log_probability])
def test_gradients_agree_with_finite_differences(options: int, score: object) -> None:
    logits, prompts = random_case(1, options)
    logits.requires_grad_()
    assert callable(score)
    assert torch.autograd.gradcheck(lambda x: score(x, prompts, True), logits)


def test_padded_positions_do_not_matter() -> None:
    logits, prompts = random_case(2, 1)
    changed = logits.clone()
    changed[prompts.scored == PADDING] = 1e4
    assert not torch.equal(logits, changed)
    assert torch.equal(logit_difference(logits, prompts), logit_difference(changed, prompts))
    assert torch.equal(is_correct(logits, prompts, "argmax"), is_correct(changed, prompts, "argmax"))


def test_a_tie_is_no_correct_choice() -> None:
    logits, prompts = random_case(3, 2)
    twin = Prompts(
        **{name: value[:, :1].repeat_interleave(2, 1) for name, value in vars(prompts).items() if value is not None}
    )
    assert not is_correct(logits[:, :1].repeat_interleave(2, 1), twin, "choice").any()
