"""An answer that is put into the error on purpose is found there, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from hagd.config.stages import ValidationConfig
from hagd.patching.error_ablation import logits_without_errors
from hagd.patching.means import slot_means
from hagd.patching.objective import Objective
from hagd.patching.patched_model import PatchedModel
from hagd.tasks.records import Prompts, TaskData
from hagd.tasks.scoring import is_correct
from hagd.transcoders.records import Transcoder
from hagd.validation.dark_matter import _probed_rows, measure_errors
from tests import reference
from tests.builders import patched_model, random_model, random_prompts, random_transcoders
from tests.ground_truth.compiled import Layer, Neuron, Stream, compile_gpt2, exact_transcoders, looking_at

P = 5
CONFIG = ValidationConfig(n_bootstrap=50, batch_size=17)


def copying(seed: int, n: int) -> Prompts:
    """`x y =` → x."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.cat([torch.randint(P, (n, 2), generator=g), torch.full((n, 1), P)], dim=1)
    answer = tokens[:, :1]
    return Prompts(
        tokens=tokens[:, None],
        counterfactual=tokens[:, None].roll(1, 0),
        slots=torch.arange(3).repeat(n, 1, 1),
        scored=torch.full((n, 1, 1), 2),
        answers=answer[:, None, :, None],
        distractors=((answer + 1) % P)[:, None, :, None],
    )


def copying_model(explained: str) -> tuple[PatchedModel, TaskData]:
    """Neurons write x to the logits, others y where nothing reads; one kind is features, the other is the error."""
    stream = Stream({"token": P + 1, "position": 3, "x": P + 1, "y": P + 1, "junk": P + 1, "out": P + 1})
    one_hot = torch.eye(P + 1)
    answering = [Neuron(stream.vector(x=one_hot[c]), -0.5, stream.vector(out=2 * one_hot[c])) for c in range(P)]
    idle = [Neuron(stream.vector(y=one_hot[c]), -0.5, stream.vector(junk=2 * one_hot[c])) for c in range(P)]
    heads = [looking_at(stream, [0], "token", "x"), looking_at(stream, [1], "token", "y")]
    lm = compile_gpt2(stream, [Layer(heads, answering + idle)], P + 1, "copying")
    (exact,) = exact_transcoders(lm).transcoders
    kept = slice(0, P) if explained == "answer" else slice(P, 2 * P)
    transcoders = replace(exact_transcoders(lm), transcoders=(_part(exact, kept),))
    task = TaskData(
        "copying", ("x", "y", "="), "argmax", False, 1 / P, (), None, copying(0, 60), copying(1, 9), copying(2, 40)
    )
    return PatchedModel(lm, transcoders, slot_means(lm, transcoders, task.discovery, 3, batch=16)), task


def _part(transcoder: Transcoder, kept: slice) -> Transcoder:
    names = ("W_enc", "b_enc", "W_dec", "threshold")
    return replace(transcoder, **{name: getattr(transcoder, name)[kept] for name in names})


def test_an_answer_in_the_error_is_read_there_and_lost_with_it() -> None:
    found = measure_errors(*copying_model("other"), CONFIG, 0).metrics
    assert found["dark_matter.layer0.probe_error"] == 1.0
    assert found["dark_matter.layer0.probe_error.low"] == 1.0
    for source in ("features", "reconstruction", "shuffled"):
        assert found[f"dark_matter.layer0.probe_{source}"] < 0.45, "chance is 0.2"
    assert found["dark_matter.layer0.lost_mean"] > 0.6 and found["dark_matter.layer0.lost_zero"] > 0.6
    assert found["dark_matter.layer0.lost_mean.low"] <= found["dark_matter.layer0.lost_mean"]
    assert found["dark_matter.classes"] == P and not any(key.startswith("dark_matter.all") for key in found)


def test_an_answer_in_the_features_is_not_in_the_error() -> None:
    found = measure_errors(*copying_model("answer"), CONFIG, 0).metrics
    assert found["dark_matter.layer0.probe_features"] == found["dark_matter.layer0.probe_reconstruction"] == 1.0
    assert found["dark_matter.layer0.probe_error"] < 0.45
    assert found["dark_matter.layer0.lost_mean"] == found["dark_matter.layer0.lost_zero"] == 0.0
    assert 0.2 < found["dark_matter.layer0.fvu"] < 0.8, "both kinds of neurons write as much"


@pytest.mark.parametrize("site", ["mlp", "resid"])
@pytest.mark.parametrize("layers", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("zero", [False, True])
def test_ablated_errors_are_those_of_a_model_wired_by_hand(site: str, layers: Sequence[int], zero: bool) -> None:
    prompts, lm = random_prompts(c=1), random_model("gpt2", length=6)
    patched = patched_model(lm, random_transcoders(lm, site=site), prompts)  # type: ignore[arg-type]
    tokens, slots = prompts.tokens[:, 0], prompts.slots[:, 0].clamp(min=0)

    def write(layer: int, read: Tensor, written: Tensor) -> Tensor:
        if layer not in layers:
            return written
        transcoder = patched.transcoders.transcoders[layer]
        own = transcoder.decode(transcoder.encode(read))
        return own if zero else own + patched.means.errors[layer][slots]

    by_hand = reference.run(lm, tokens, **{"write" if site == "mlp" else "write_resid": write})
    scored = prompts.scored[:, 0].clamp(min=0)
    wanted = torch.stack([row[at] for row, at in zip(by_hand.logits, scored, strict=True)])
    found = logits_without_errors(patched, prompts, layers, zero=zero)[:, 0]
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("c", [1, 3])
def test_all_errors_at_their_mean_are_the_model_with_every_feature_kept(c: int) -> None:
    prompts, lm = random_prompts(c=c), random_model("gpt_neox", length=6)
    patched = patched_model(lm, random_transcoders(lm, cross_layer=True), prompts)
    without = logits_without_errors(patched, prompts, patched.transcoders.layers, zero=False)
    assert torch.allclose(without, patched.logits(prompts, torch.ones(patched.gate_shape)), atol=1e-5)
    assert torch.allclose(logits_without_errors(patched, prompts, (), zero=False), patched.full_logits(prompts))


def test_lost_accuracy_is_that_of_the_prompts_one_by_one() -> None:
    patched, task = copying_model("other")
    found = measure_errors(patched, task, CONFIG, 0).metrics
    objective = Objective(patched, task, task.validation, ablation="mean", error="keep", batch_size=3)
    kept = [
        bool(is_correct(logits_without_errors(patched, one, (0,), zero=False), one, "argmax"))
        for one in (task.validation[i : i + 1] for i in range(len(task.validation)))
    ]
    assert found["dark_matter.layer0.lost_mean"] == pytest.approx(1 - np.mean(kept) / objective.full().accuracy)


def test_rows_of_prompts_and_of_options() -> None:
    prompts = random_prompts(n=4)
    row, position, label, prompt, place = _probed_rows(prompts)
    expected = [
        (i, int(at), int(prompts.answers[i, 0, a, 0]), i, a)
        for i in range(4)
        for a, at in enumerate(prompts.scored[i, 0].tolist())
        if at >= 0
    ]
    assert list(zip(*(x.tolist() for x in (row, position, label, prompt, place)), strict=True)) == expected
    choices = random_prompts(n=2, c=3)
    row, position, label, prompt, _ = _probed_rows(choices)
    assert row.tolist() == list(range(6)) and prompt.tolist() == [0, 0, 0, 1, 1, 1]
    assert label.tolist() == [1, 0, 0, 1, 0, 0], "the right option is the first"
    assert position.tolist() == [max(at) for at in choices.scored.flatten(0, 1).tolist()]
