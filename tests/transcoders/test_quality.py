"""Quality measures against models wired by hand (`tests.reference`)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hagd.activations.outliers import Outliers
from hagd.transcoders.quality import measure
from hagd.transcoders.records import DENSITY_EDGES, TranscoderSet
from hagd.transcoders.splicing import spliced_divergence
from tests.builders import random_model, random_prompts, random_transcoders
from tests.reference import features_of, run, site_values

EVERYTHING = Outliers(torch.full((2,), math.inf), torch.full((2,), math.inf))


def measured(found: TranscoderSet | None = None, outliers: Outliers = EVERYTHING) -> TranscoderSet:
    lm = random_model(length=6)
    found = found or random_transcoders(lm)
    return measure(lm, found, None, outliers, random_prompts(n=40), n_slots=3)


def test_reconstruction_is_that_of_the_slow_model() -> None:
    lm, prompts = random_model(length=6), random_prompts(n=40)
    found = random_transcoders(lm)
    tokens, slots = prompts.tokens[:, 0], prompts.slots[:, 0]
    f, errors = features_of(lm, found, tokens)
    result = measured(found)
    for i, quality in enumerate(result.quality):
        y = site_values(lm, found, tokens)[i][1]

        def fvu(where: Tensor, i: int = i, y: Tensor = y) -> float:
            spread = y[where] - y[slots >= 0].mean(0)
            return float(errors[i][where].square().sum() / spread.square().sum())

        assert quality.fvu == pytest.approx(fvu(slots >= 0), rel=1e-4)
        assert quality.fvu_by_slot == pytest.approx([fvu(slots == s) for s in range(3)], rel=1e-4)
        frequency = (f[i][slots >= 0] > 0).float().mean(0)
        assert quality.l0 == pytest.approx(float(frequency.sum()), rel=1e-5)
        assert quality.dead == pytest.approx(float((frequency == 0).float().mean()))
        assert quality.dense == pytest.approx(float((frequency > 0.1).float().mean()))
        for share, low, high in zip(quality.density, DENSITY_EDGES[:-1], DENSITY_EDGES[1:], strict=True):
            inside = (frequency >= 10**low) & (frequency < 10**high) | (frequency == 1) & (high == 0)
            assert share == pytest.approx(float(inside.float().mean()), abs=1e-6)
        assert math.isnan(quality.prediction_r2)


def test_splicing_replaces_the_output_where_it_is_told_to() -> None:
    lm, prompts = random_model(length=6), random_prompts(n=9)
    found = random_transcoders(lm)
    tokens, keep = prompts.tokens[:, 0], prompts.slots[:, 0] >= 0
    means = torch.randn(2, lm.d_model, generator=torch.Generator().manual_seed(0))
    clean = run(lm, tokens).logits.log_softmax(-1)
    for spliced in ([1], [0, 1]):

        def reconstructed(layer: int, read: Tensor, written: Tensor, spliced: list[int] = spliced) -> Tensor:
            if layer not in spliced:
                return written
            t = found.transcoders[layer]
            return torch.where(keep[..., None], t.decode(t.encode(read)), written)

        def ablated(layer: int, read: Tensor, written: Tensor, spliced: list[int] = spliced) -> Tensor:
            return torch.where(keep[..., None], means[layer], written) if layer in spliced else written

        expected = []
        for write in (reconstructed, ablated):
            other = run(lm, tokens, write).logits.log_softmax(-1)
            expected.append(float((clean.exp() * (clean - other)).sum(-1)[keep].mean()))
        assert spliced_divergence(lm, found, spliced, tokens, keep, means) == pytest.approx(expected, rel=1e-3)
        assert min(expected) > 1e-4


def test_loss_recovered_is_one_minus_a_ratio_and_all_layers_cost_more() -> None:
    result = measured()
    assert all(quality.kl > 0 and quality.loss_recovered < 1 for quality in result.quality)
    assert result.kl > max(quality.kl for quality in result.quality) * 0.5
    assert result.loss_recovered < 1


def test_twin_decoder_rows_are_counted() -> None:
    found = random_transcoders(random_model(length=6))
    assert measured(found).quality[0].near_duplicates == 0
    found.transcoders[0].W_dec[3] = 2 * found.transcoders[0].W_dec[7]
    assert measured(found).quality[0].near_duplicates == pytest.approx(2 / 12)


def test_outliers_are_not_measured() -> None:
    lm, prompts = random_model(length=6), random_prompts(n=40)
    norm = site_values(lm, random_transcoders(lm), prompts.tokens[:, 0])[0][0].norm(dim=-1)
    limits = Outliers(torch.tensor([float(norm.median()), math.inf]), torch.full((2,), math.inf))
    few, all_of_them = measured(outliers=limits), measured()
    assert few.quality[0].fvu != pytest.approx(all_of_them.quality[0].fvu, rel=1e-6)


def test_without_limits_they_are_measured_on_the_prompts() -> None:
    lm = random_model(length=6)
    found = measure(lm, random_transcoders(lm), None, None, random_prompts(n=40), n_slots=3)
    assert found.quality[0].fvu == pytest.approx(measured().quality[0].fvu, rel=1e-6)
