"""The compiled circuits are what they are said to be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hagd.patching.objective import Objective
from hagd.tasks.scoring import is_correct
from tests.ground_truth.mechanisms import MECHANISMS, Mechanism


@pytest.fixture(scope="module", params=MECHANISMS)
def mechanism(request: pytest.FixtureRequest) -> Mechanism:
    return MECHANISMS[request.param]()


def accuracy(mechanism: Mechanism, gates: Tensor) -> float:
    prompts = mechanism.task.validation
    logits = mechanism.patched.logits(prompts, gates.float(), ablation="mean", error="mean")
    return float(is_correct(logits, prompts, "argmax").float().mean())


def test_the_model_answers_every_prompt_and_is_all_features_and_heads(mechanism: Mechanism) -> None:
    prompts, patched = mechanism.task.validation, mechanism.patched
    logits = patched.lm.logits_at(prompts.tokens[:, 0], prompts.scored[:, 0])[:, None]
    assert is_correct(logits, prompts, "argmax").all()
    everything = patched.logits(prompts, torch.ones(patched.gate_shape), ablation="mean", error="mean")
    torch.testing.assert_close(everything, logits, atol=1e-3, rtol=0)


def test_members_alone_answer_and_nothing_does_not(mechanism: Mechanism) -> None:
    # A lookup that no discovery prompt needed is no candidate, so modular_lookup may miss prompts of another split.
    assert accuracy(mechanism, mechanism.members) > 0.85
    assert accuracy(mechanism, torch.zeros(mechanism.patched.gate_shape)) < 0.4
    assert accuracy(mechanism, ~mechanism.members) < 0.4


def test_every_member_matters_and_the_rest_together_does_not(mechanism: Mechanism) -> None:
    patched, task = mechanism.patched, mechanism.task
    objective = Objective(patched, task, task.discovery, ablation="mean", error="mean", batch_size=512)
    prompts = torch.arange(len(objective))

    def divergence(gates: Tensor) -> float:
        return float(objective.divergence(gates.float(), prompts))

    whole = divergence(torch.ones(patched.gate_shape))
    assert whole < 1e-7
    for node in mechanism.members.nonzero()[:, 0].tolist():
        gates = torch.ones(patched.gate_shape)
        gates[node] = 0
        assert divergence(gates) > 1e-6, node
    assert divergence(mechanism.members) < 0.05
