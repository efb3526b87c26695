from __future__ import annotations

import numpy as np
import pytest
import torch

from hagd.patching.objective import Objective
from hagd.search.gates import BETA, GAMMA, ZETA, descend, expected_open, hard_concrete, scatter
from tests.search.trained import Trained

LOGITS = torch.tensor([-6.0, -2.0, -0.5, 0.0, 1.0, 3.0])


def test_gates_are_the_formula_of_louizos_et_al() -> None:
    found = hard_concrete(LOGITS, torch.Generator().manual_seed(0)).numpy()
    u = torch.rand(6, generator=torch.Generator().manual_seed(0)).double().numpy()
    for gate, z, noise in zip(found, LOGITS.tolist(), u, strict=True):
        s = 1 / (1 + np.exp(-(np.log(noise) - np.log(1 - noise) + z) / BETA))
        assert gate == pytest.approx(min(max(s * (ZETA - GAMMA) + GAMMA, 0), 1), abs=1e-5)


def test_the_expected_number_of_open_gates_is_their_frequency() -> None:
    g = torch.Generator().manual_seed(0)
    gates = hard_concrete(LOGITS.repeat(40_000, 1), g)
    frequency = (gates > 0).double().mean(0)
    for z, share in zip(LOGITS, frequency, strict=True):
        assert expected_open(z[None]).item() == pytest.approx(share.item(), abs=0.01)
    assert expected_open(LOGITS).item() == pytest.approx(frequency.sum().item(), abs=0.02)
    assert gates.min() == 0 and gates.max() == 1 and ((gates > 0) & (gates < 1)).any()


def test_gates_have_gradients_where_they_are_not_clamped() -> None:
    logits = LOGITS.repeat(50, 1).requires_grad_()
    gates = hard_concrete(logits, torch.Generator().manual_seed(1))
    gates.sum().backward()
    assert logits.grad is not None
    inside = (gates > 0) & (gates < 1)
    assert (logits.grad[inside] > 0).all() and (logits.grad[~inside] == 0).all()


def test_scatter_puts_values_at_their_places() -> None:
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    gates = scatter(values, torch.tensor([7, 0, 11]), (2, 2, 3))
    assert gates.shape == (2, 2, 3)
    assert {i: v for i, v in enumerate(gates.flatten().tolist()) if v} == {7: 1.0, 0: 2.0, 11: 3.0}
    gates[0, 0, 0].backward()
    assert values.grad is not None and values.grad.tolist() == [0, 1, 0]


def run(trained: Trained, sizes: list[int], steps: int, seed: int = 0) -> dict[int, torch.Tensor]:
    return descend(
        trained.objective,
        trained.flat,
        torch.full((trained.graph.n_candidates,), 1.0),
        sizes,
        steps=steps,
        learning_rate=0.1,
        batch=32,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.fixture(scope="module")
def found(trained: Trained) -> dict[int, torch.Tensor]:
    return run(trained, [20, 60], steps=300)


def test_the_schedule_reaches_the_wanted_sizes(trained: Trained, found: dict[int, torch.Tensor]) -> None:
    assert set(found) == {20, 60} and trained.graph.n_candidates > 150
    for size, logits in found.items():
        assert size / 1.8 < expected_open(logits).item() < size * 1.8


def test_learned_gates_beat_chance(trained: Trained, found: dict[int, torch.Tensor]) -> None:
    n = trained.graph.n_candidates
    for size, logits in found.items():
        learned = trained.divergence(logits.topk(size).indices)
        g = torch.Generator().manual_seed(1)
        chance = [trained.divergence(torch.randperm(n, generator=g)[:size]) for _ in range(10)]
        assert learned < 0.8 * min(chance)
    divergence = {size: trained.divergence(logits.topk(size).indices) for size, logits in found.items()}
    assert divergence[60] < divergence[20] < trained.divergence(torch.empty(0, dtype=torch.long))


def test_the_same_generator_gives_the_same_gates(trained: Trained) -> None:
    one, same, other = (run(trained, [50], steps=4, seed=seed)[50] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_steps_are_shared_by_the_sizes_and_counted(trained: Trained) -> None:
    seen: list[tuple[int, int]] = []
    start = torch.full((trained.graph.n_candidates,), 1.0)
    before = trained.objective.patched.evaluations
    logits = descend(
        trained.objective,
        trained.flat,
        start,
        [50, 80, 20, 80],
        steps=7,
        learning_rate=0.1,
        batch=10,
        generator=torch.Generator().manual_seed(0),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert set(logits) == {20, 50, 80} and seen == [(i, 7) for i in range(1, 8)]
    assert trained.objective.patched.evaluations - before == 7 * 10 * 3
    assert torch.equal(start, torch.ones_like(start)), "the start is not changed"


def test_a_step_runs_no_more_prompts_at_once_than_the_objective(
    trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, lm = trained.objective, trained.objective.patched.lm
    small = Objective(old.patched, old.task, old.prompts, ablation="mean", error="mean", batch_size=5)
    whole, seen, logits_at = run(trained, [50], steps=3)[50], [], lm.logits_at

    def counted(tokens: torch.Tensor, scored: torch.Tensor) -> torch.Tensor:
        seen.append(len(tokens))
        return logits_at(tokens, scored)

    monkeypatch.setattr(lm, "logits_at", counted)
    parts = run(Trained(small, trained.graph), [50], steps=3)[50]
    assert max(seen) == 5 and sum(seen) == 3 * 32
    assert torch.allclose(parts, whole, atol=1e-3)


def test_without_sizes_nothing_is_trained(trained: Trained) -> None:
    assert run(trained, [], steps=5) == {}
