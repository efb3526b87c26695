"""The sampled prediction loss against the whole sum; the whole sum is checked with the objective."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from hagd.config.transcoder import PredictionHeadKind
from hagd.transcoders.dictionary import Codes
from hagd.transcoders.objective import StackedTranscoders
from tests.transcoders.slow import LAYERS, D, dense, random_stacked, random_tokens, settings

KINDS: tuple[PredictionHeadKind, ...] = ("tied", "tied_low_rank", "low_rank", "dense")
SAMPLE = 3


def two_layers(kind: PredictionHeadKind, activation: str = "topk") -> tuple[StackedTranscoders, list[Codes], Tensor]:
    config = settings(prediction_head=kind, activation=activation, expansion=2)
    stacked, (x, _) = random_stacked(config, n_layers=2), random_tokens(n_layers=2)
    codes = stacked.encode(x)
    return stacked, codes, stacked.decode(codes, x)[1][0]


def loss(stacked: StackedTranscoders, codes: list[Codes], written: Tensor, sample: Tensor) -> Tensor:
    return stacked.heads["0"].loss(
        codes[0], written, codes[1], stacked.dictionaries[1], stacked.dictionaries[1].lengths(), sample
    )  # type: ignore[operator]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_the_mean_over_all_samples_is_the_whole_sum(kind: PredictionHeadKind, activation: str) -> None:
    """So is the mean of the gradients. JumpReLU's pairs near the threshold are not active, but not sampled either."""
    stacked, codes, written = two_layers(kind, activation)
    m = stacked.dictionaries[1].m
    everything = loss(stacked, codes, written, torch.arange(m))
    samples = list(combinations(range(m), SAMPLE))
    each = torch.stack([loss(stacked, codes, written, torch.tensor(sample)) for sample in samples])
    assert each.std() > 0.01 * everything
    torch.testing.assert_close(each.mean(), everything, rtol=1e-12, atol=0)
    found, expected = (gradients(stacked, value) for value in (each.mean(), everything))
    assert expected.keys() == found.keys() >= {name for name, _ in stacked.named_parameters() if "heads" in name}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-12)


def gradients(stacked: StackedTranscoders, value: Tensor) -> dict[str, Tensor]:
    stacked.zero_grad()
    value.backward(retain_graph=True)
    return {name: p.grad for name, p in stacked.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_in_mixed_precision_is_near_one_in_full(kind: PredictionHeadKind) -> None:
    config = settings(prediction_head=kind, expansion=2)
    stacked, tokens = random_stacked(config, n_layers=2).float(), [side.float() for side in random_tokens(n_layers=2)]
    full = stacked.losses(*tokens, 0).prediction
    with torch.autocast("cpu", torch.bfloat16):
        mixed = stacked.losses(*tokens, 0)
    torch.testing.assert_close(mixed.prediction, full, rtol=0.05, atol=0)
    mixed.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in stacked.heads.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_is_no_sum_in_float16(kind: PredictionHeadKind) -> None:
    """Which cannot hold what many tokens come to."""
    config = settings(prediction_head=kind, expansion=2)
    stacked = random_stacked(config, n_layers=2).float()
    tokens = [side.float() for side in random_tokens(n_layers=2, n=60_000)]
    full = stacked.losses(*tokens, 0).prediction
    with torch.autocast("cpu", torch.float16):
        mixed = stacked.losses(*tokens, 0).prediction
    torch.testing.assert_close(mixed, full, rtol=0.01, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_the_sample_does_not_matter(kind: PredictionHeadKind) -> None:
    stacked, codes, written = two_layers(kind)
    one, other = (loss(stacked, codes, written, torch.tensor(sample)) for sample in ([6, 1, 4], [4, 6, 1]))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_samples_are_distinct_features_all_as_likely() -> None:
    stacked = random_stacked(settings(head_negatives=SAMPLE, expansion=2))
    dictionary = stacked.dictionaries[0]
    counts, n = torch.zeros(dictionary.m), 3000
    for step in range(n):
        sample = stacked._sampled(dictionary.m, 0, step)
        assert len(sample.unique()) == SAMPLE
        counts[sample] += 1
    p = SAMPLE / dictionary.m
    assert (counts / n - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5
    for negatives in (8, 9, 512):
        stacked = random_stacked(settings(head_negatives=negatives, expansion=2))
        assert stacked._sampled(dictionary.m, 0, 0).tolist() == list(range(8))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_with_few_negatives_are_right_on_average(kind: PredictionHeadKind) -> None:
    whole, (x, y) = random_stacked(settings(prediction_head=kind)), random_tokens()
    sampled = random_stacked(settings(prediction_head=kind, head_negatives=8))
    torch.manual_seed(0)
    found = torch.stack([sampled.losses(x, y, step).prediction.detach() for step in range(100)])
    error = found.std() / len(found) ** 0.5
    assert found.std() > 0
    assert (found.mean() - whole.losses(x, y, 0).prediction).abs() < 4 * error


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_are_what_the_loss_compares(kind: PredictionHeadKind) -> None:
    stacked, codes, written = two_layers(kind)
    following = stacked.dictionaries[1]
    (predicted,) = stacked.predict(codes, [written])
    assert predicted.shape == (len(written), following.m) and (predicted >= 0).all() and (predicted > 0).any()
    expected = ((dense(codes[1]) - predicted) * following.W_dec.norm(dim=1)).square().sum()
    found = loss(stacked, codes, written, torch.arange(following.m))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_a_tied_head_starts_by_encoding_what_was_written() -> None:
    config = settings(expansion=2)
    stacked, (x, _) = StackedTranscoders(config, 2, D, seed=0).double(), random_tokens(n_layers=2)
    codes = stacked.encode(x)
    written = stacked.decode(codes, x)[1]
    expected = (written[0] @ stacked.dictionaries[1].W_enc.T).relu()
    torch.testing.assert_close(stacked.predict(codes, written)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_head_learns(kind: PredictionHeadKind) -> None:
    stacked = StackedTranscoders(settings(prediction_head=kind, head_negatives=5 * D), LAYERS, D, seed=0)
    stacked.losses(*(side.float() for side in random_tokens(n=50)), 0).prediction.backward()
    for name, parameter in stacked.heads.named_parameters():
        at_zero_by_design = kind == "tied_low_rank" and name.endswith("down")  # until its partner has moved
        assert (parameter.grad.abs().max() > 0) != at_zero_by_design, name


@pytest.mark.parametrize("kind", KINDS)
def test_errors_of_small_features_beside_a_skip_count_little(kind: PredictionHeadKind) -> None:
    """Relative to their own energy they would outweigh all that such features can explain, which then die."""
    small = []
    for skip in (False, True):
        stacked = random_stacked(settings(prediction_head=kind, skip=skip, head_negatives=100), n_layers=2)
        x, y = random_tokens(n_layers=2)
        with torch.no_grad():
            stacked.dictionaries[1].W_dec.mul_(0.01)
        small.append(stacked.losses(x, y, 0).prediction.item())
    assert small[0] > 0.1 and small[1] < 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_a_prediction_that_is_not_finite_shows_at_its_layer(kind: PredictionHeadKind) -> None:
    stacked = random_stacked(settings(prediction_head=kind))
    x, y = random_tokens()
    with torch.no_grad():
        for parameter in stacked.heads["0"].parameters():
            parameter.mul_(1e200)
    assert stacked.losses(x, y, 0).fvu_by_layer.isfinite().tolist() == [True, False, True]
