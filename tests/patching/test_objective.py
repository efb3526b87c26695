from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import PADDING, Prompts
from hagd.tasks.scoring import is_correct, log_probability, logit_difference
from tests.builders import patched_model, prompts_task, random_model, random_prompts, random_transcoders


@cache
def objective(c: int = 1, batch_size: int = 4) -> Objective:
    prompts = random_prompts(n=7, c=c)
    lm = random_model("gpt2", length=6)
    patched = patched_model(lm, random_transcoders(lm), prompts)
    return Objective(patched, prompts_task(prompts), prompts, ablation="mean", error="mean", batch_size=batch_size)


def random_gates(seed: int, *leading: int) -> Tensor:
    shape = objective().patched.gate_shape
    return (torch.rand(*leading, *shape, generator=torch.Generator().manual_seed(seed)) < 0.5).float()


def choice_distribution(logits: Tensor, prompts: Prompts, row: int) -> Tensor:
    """Over the options, each scored by the sum of its tokens' log-probabilities."""
    scores = []
    for option in range(logits.shape[1]):
        score = torch.zeros(())
        for i, position in enumerate(prompts.scored[row, option].tolist()):
            if position != PADDING:
                log_p = logits[row, option, i].log_softmax(-1)
                score = score + log_p[prompts.answers[row, option, i, 0]]
        scores.append(score)
    return torch.stack(scores).softmax(0)


def slow_divergence(target: Objective, gates: Tensor, row: int) -> float:
    """KL from the full to the patched model, prompt by prompt: mean over scored positions, or over options."""
    prompts = target.prompts
    full = target.patched.lm.logits_at(prompts.tokens.flatten(0, 1), prompts.scored.flatten(0, 1))
    full = full.unflatten(0, prompts.tokens.shape[:2])
    patched = target.patched.logits(prompts, gates)
    if prompts.tokens.shape[1] > 1:
        p, q = (choice_distribution(x, prompts, row) for x in (full, patched))
        return float((p * (p / q).log()).sum())
    values = []
    for i, position in enumerate(prompts.scored[row, 0].tolist()):
        if position != PADDING:
            p, q = full[row, 0, i].softmax(-1), patched[row, 0, i].softmax(-1)
            values.append(float((p * (p / q).log()).sum()))
    return sum(values) / len(values)


@pytest.mark.parametrize("c", [1, 3])
def test_divergence_is_the_mean_of_the_slow_one(c: int) -> None:
    target, gates = objective(c), random_gates(0)
    expected = [slow_divergence(target, gates, row) for row in range(7)]
    assert max(expected) > 1e-2
    for index in ([0, 1, 2, 3, 4, 5, 6], [5, 2]):
        found = target.divergence(gates, torch.tensor(index)).item()
        assert found == pytest.approx(sum(expected[i] for i in index) / len(index), rel=1e-3)


def slow_shortfall(target: Objective, gates: Tensor, row: int) -> float:
    """Prompt by prompt, answer by answer."""
    prompts = target.prompts
    patched = target.patched.logits(prompts, gates)
    full = target.patched.full_logits(prompts)

    def leads(logits: Tensor, row: int) -> list[float]:
        if logits.shape[1] > 1:
            return [float(logit_difference(logits, prompts)[row])]
        found = []
        for i, position in enumerate(prompts.scored[row, 0].tolist()):
            if position != PADDING:
                answers, distractors = (
                    torch.stack([logits[row, 0, i, token] for token in tokens[row, 0, i].tolist() if token != PADDING])
                    for tokens in (prompts.answers, prompts.distractors)
                )
                found.append(float(answers.logsumexp(0) - distractors.logsumexp(0)))
        return found

    everything = [lead for each in range(len(prompts)) for lead in leads(full, each)]
    power = sum(lead**2 for lead in everything) / len(everything)
    missing = [max(a - b, 0) ** 2 for a, b in zip(leads(full, row), leads(patched, row), strict=True)]
    return sum(missing) / len(missing) / power


@pytest.mark.parametrize("c", [1, 3])
def test_the_shortfall_is_the_slow_one(c: int) -> None:
    old = objective(c)
    target = Objective(
        old.patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=4, loss="shortfall"
    )
    gates = random_gates(0)
    expected = torch.tensor([slow_shortfall(target, gates, row) for row in range(7)])
    assert expected.max() > 1e-3 and (expected < expected.max() / 2).any()
    torch.testing.assert_close(target.loss_by_prompt(gates, torch.arange(7)), expected, rtol=1e-3, atol=1e-6)
    index = torch.tensor([5, 2, 6])
    assert target.loss(gates, index).item() == pytest.approx(expected[index].mean().item(), rel=1e-3)
    two, owner = random_gates(4, 2), torch.tensor([1, 0, 1])
    alone = [target.loss(two[owner[i]], index[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(target.loss_by_prompt(two, index, owner), torch.stack(alone), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(target.losses(two, index)[0], target.loss(two[0], index), rtol=1e-4, atol=1e-6)
    assert old.loss(gates, index) == old.divergence(gates, index)
    both = Objective(old.patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=4, loss="both")
    empty = old.divergence(torch.zeros(old.patched.gate_shape), torch.arange(7))
    total = target.loss(gates, index) + old.divergence(gates, index) / empty
    torch.testing.assert_close(both.loss(gates, index), total, rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 1000), c=st.sampled_from([1, 3]))
@settings(max_examples=25, deadline=None)
def test_divergence_is_never_negative(seed: int, c: int) -> None:
    gates = random_gates(seed) * torch.rand((), generator=torch.Generator().manual_seed(seed))
    assert objective(c).divergence(gates, torch.arange(7)) > -1e-6


@pytest.mark.parametrize("c", [1, 3])
def test_the_full_model_diverges_from_nothing(c: int) -> None:
    old = objective(c)
    kept = Objective(old.patched, old.task, old.prompts, ablation="mean", error="keep", batch_size=4)
    open_gates = torch.ones(old.patched.gate_shape)
    assert kept.divergence(open_gates, torch.arange(7)).item() == pytest.approx(0, abs=1e-5)
    assert torch.equal(kept.outcome(open_gates).correct, kept.full().correct)


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("n_gates", [1, 5])
def test_many_divergences_at_once_are_a_loop_of_single_ones(c: int, size: int, n_gates: int) -> None:
    gates = random_gates(1, n_gates)
    index = torch.randperm(7, generator=torch.Generator().manual_seed(0))[:size]
    before = objective(c).patched.evaluations
    found = objective(c).divergences(gates, index)
    assert objective(c).patched.evaluations - before == size * n_gates
    expected = torch.stack([objective(c).divergence(one, index) for one in gates])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_no_pass_has_more_prompts_than_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a test reads more prompts than that, as do those of the whole split."""
    small, large, gates = objective(1, 3), objective(1, 100), random_gates(1, 2)
    index, run = torch.tensor([6, 0, 3, 5, 2, 1, 4]), PatchedModel.logits
    expected = large.losses(gates, index)
    sizes: list[int] = []

    def logits(self: PatchedModel, prompts: Prompts, gates: Tensor, **options: Any) -> Tensor:
        sizes.append(len(prompts))
        return run(self, prompts, gates, **options)

    monkeypatch.setattr(PatchedModel, "logits", logits)
    torch.testing.assert_close(small.losses(gates, index), expected, rtol=1e-4, atol=1e-6)
    assert sizes == [3, 3, 1] * 2


@pytest.mark.parametrize("c", [1, 3])
def test_outcomes_are_the_scores_of_the_logits_in_any_batch_size(c: int) -> None:
    small, large = objective(c, 2), objective(c, 100)
    gates = random_gates(2)
    logits = large.patched.logits(large.prompts, gates)
    for target in (small, large):
        outcome = target.outcome(gates)
        torch.testing.assert_close(outcome.logit_difference, logit_difference(logits, target.prompts))
        assert torch.equal(outcome.correct, is_correct(logits, target.prompts, target.task.accuracy))
        assert outcome.accuracy == outcome.correct.double().mean().item()
    lm = large.patched.lm
    full = lm.logits_at(large.prompts.tokens.flatten(0, 1), large.prompts.scored.flatten(0, 1)).unflatten(0, (7, c))
    torch.testing.assert_close(small.full().logit_difference, logit_difference(full, large.prompts))


@pytest.mark.parametrize("c", [1, 3])
def test_metrics_are_the_scores_of_the_chosen_prompts(c: int) -> None:
    target, gates, index = objective(c), random_gates(3), torch.tensor([6, 1])
    logits = target.patched.logits(target.prompts, gates)
    for name, score in (("log_probability", log_probability), ("logit_difference", logit_difference)):
        torch.testing.assert_close(target.metric(name, gates, index), score(logits, target.prompts)[index])
    owner = torch.tensor([1, 0])
    two = random_gates(4, 2)
    found = target.metric("logit_difference", two, index, owner)
    for i in range(2):
        alone = target.metric("logit_difference", two[owner[i]], index[i : i + 1])
        torch.testing.assert_close(found[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_samples_are_distinct_prompts() -> None:
    target, g = objective(), torch.Generator().manual_seed(0)
    assert target.sample(7, g).tolist() == target.sample(100, g).tolist() == list(range(7))
    drawn = [target.sample(3, g).tolist() for _ in range(40)]
    assert all(len(set(sample)) == 3 for sample in drawn)
    assert {i for sample in drawn for i in sample} == set(range(7))


def test_divergence_trains_gates() -> None:
    """Its gradient is that of finite differences."""
    prompts = random_prompts(n=7)
    lm = random_model("gpt2", length=6)
    patched = patched_model(lm, random_transcoders(lm, k=12), prompts)
    target = Objective(patched, prompts_task(prompts), prompts, ablation="mean", error="mean", batch_size=4)
    gates = torch.rand(patched.gate_shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target.divergence(gates, torch.arange(7)).backward()
    assert gates.grad is not None
    direction = gates.grad / gates.grad.norm()
    ends = [target.divergence(gates.detach() + s * 1e-2 * direction, torch.arange(7)).item() for s in (1, -1)]
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(gates.grad.norm().item(), rel=2e-2)
