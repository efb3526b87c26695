"""Quality measures against models wired by hand (`tests.reference`)."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hagd.activations.outliers import Outliers
from hagd.config.transcoder import TranscoderConfig
from hagd.tasks.records import IGNORED, PADDING
from hagd.transcoders import splicing
from hagd.transcoders.metrics import SCALARS, flat_metrics
from hagd.transcoders.module import TranscoderTraining
from hagd.transcoders.objective import Scaling, StackedTranscoders
from hagd.transcoders.quality import measure, next_tokens
from hagd.transcoders.records import DENSITY_EDGES, Transcoder, TranscoderSet
from hagd.transcoders.splicing import Spliced, splice
from tests.builders import VARIANTS, random_model, random_prompts, random_transcoders
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
    targets = next_tokens(prompts)
    clean = run(lm, tokens).logits.log_softmax(-1)
    splices = [[1], [0, 1]]
    for spliced, measured in zip(splices, splice(lm, found, splices, tokens, targets, keep, means), strict=True):

        def reconstructed(layer: int, read: Tensor, written: Tensor, spliced: list[int] = spliced) -> Tensor:
            if layer not in spliced:
                return written
            t = found.transcoders[layer]
            return torch.where(keep[..., None], t.decode(t.encode(read)), written)

        def ablated(layer: int, read: Tensor, written: Tensor, spliced: list[int] = spliced) -> Tensor:
            return torch.where(keep[..., None], means[layer], written) if layer in spliced else written

        other, gone = (run(lm, tokens, write).logits.log_softmax(-1) for write in (reconstructed, ablated))
        kl = float((clean.exp() * (clean - other)).sum(-1)[keep].mean())
        losses = [slow_loss(log_p, targets, keep) for log_p in (other, clean, gone)]
        assert measured == pytest.approx((kl, *losses), rel=1e-3)
        assert kl > 1e-4 and len(set(losses)) == 3


def slow_loss(log_p: Tensor, targets: Tensor, keep: Tensor) -> float:
    """Mean of `−log P(any target)` over the kept positions that have targets."""
    losses = []
    for row in range(len(targets)):
        for t in range(targets.shape[1]):
            accepted = [int(token) for token in targets[row, t] if token != PADDING]
            if keep[row, t] and accepted:
                losses.append(-math.log(sum(float(log_p[row, t, token].exp()) for token in accepted)))
    return sum(losses) / len(losses)


def test_targets_are_the_next_tokens_and_the_answers() -> None:
    prompts = random_prompts(n=9)
    targets = next_tokens(prompts)
    for row in range(len(prompts)):
        length = int((prompts.slots[row, 0] != PADDING).sum())
        for t in range(targets.shape[1]):
            if t in prompts.scored[row, 0].tolist():
                place = prompts.scored[row, 0].tolist().index(t)
                expected = prompts.answers[row, 0, place].tolist()
            else:
                expected = [int(prompts.tokens[row, 0, t + 1]) if t + 1 < length else PADDING, PADDING]
            assert targets[row, t].tolist() == expected
    labels = torch.full((9, 6), IGNORED)
    labels[:, 4] = 5
    assert (next_tokens(replace(prompts, labels=labels))[..., 0] == labels.masked_fill(labels < 0, PADDING)).all()


def test_loss_recovered_is_a_share_of_what_ablation_costs() -> None:
    assert Spliced(kl=0.1, loss=2.0, clean_loss=1.0, ablated_loss=5.0).recovered == pytest.approx(0.75)
    assert math.isnan(Spliced(kl=0.1, loss=2.0, clean_loss=1.0, ablated_loss=1.0).recovered)


def test_each_layer_alone_and_all_at_once() -> None:
    lm, prompts = random_model(length=6), random_prompts(n=40)
    found, result = random_transcoders(lm), measured()
    tokens, keep = prompts.tokens[:, 0], prompts.slots[:, 0] >= 0
    means = torch.stack([y[keep].mean(0) for _, y in site_values(lm, found, tokens)])
    for spliced, quality in (([0], result.quality[0]), ([1], result.quality[1]), ([0, 1], result)):
        [expected] = splice(lm, found, [spliced], tokens, next_tokens(prompts), keep, means)
        assert quality.kl == pytest.approx(expected.kl, rel=1e-4)
        assert quality.loss_recovered == pytest.approx(expected.recovered, rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("variant", ["topk", "cross_layer"])
def test_splices_do_not_depend_on_their_company(variant: str) -> None:
    """Earlier layers are encoded where a later one reads them, replaced or not."""
    lm, prompts = random_model(n_layers=3, length=6), random_prompts(n=9)
    found = random_transcoders(lm, **VARIANTS[variant])
    tokens, keep = prompts.tokens[:, 0], prompts.slots[:, 0] >= 0
    f, _ = features_of(lm, found, tokens)
    means = torch.zeros(3, lm.d_model)
    clean = run(lm, tokens).logits.log_softmax(-1)

    def write(layer: int, read: Tensor, written: Tensor) -> Tensor:
        return torch.where(keep[..., None], found.reconstruct(2, f, read), written) if layer == 2 else written

    other = run(lm, tokens, write).logits.log_softmax(-1)
    kl = float((clean.exp() * (clean - other)).sum(-1)[keep].mean())
    splices = [[0], [2], [0, 2], [0, 1, 2]]
    together = splice(lm, found, splices, tokens, next_tokens(prompts), keep, means)
    assert together[1].kl == pytest.approx(kl, rel=1e-3)
    assert together == [splice(lm, found, [each], tokens, next_tokens(prompts), keep, means)[0] for each in splices]


@pytest.mark.parametrize(("variant", "in_splices"), [("topk", 3 + 3), ("cross_layer", 1 + 2 + 3 + 3)])
def test_passes_encodings_and_features_held(variant: str, in_splices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 prompts are two passes; the first 64 are seven batches of ten, at 2 · 3 layers + 3 passes each."""
    monkeypatch.setattr(splicing, "_POSITIONS", 60)
    lm = random_model(n_layers=3, length=6)
    passes, held = [], []
    features: list[weakref.ref[Tensor]] = []
    encode = Transcoder.encode

    def watched(self: Transcoder, x: Tensor) -> Tensor:
        held.append(sum(f() is not None for f in features))
        features.append(weakref.ref(f := encode(self, x)))
        return f

    monkeypatch.setattr(Transcoder, "encode", watched)
    lm.embedding.register_forward_hook(lambda *_: passes.append(1))
    measure(lm, random_transcoders(lm, **VARIANTS[variant]), None, None, random_prompts(n=100), n_slots=3)
    assert len(passes) == 2 + 7 * 9
    assert len(features) == 7 * in_splices + 3
    assert held[-3:] == ([0, 0, 0] if variant == "topk" else [0, 1, 2])
    assert max(held) == held[-1]


def test_prediction_r2_is_the_explained_share_of_the_next_layers_features() -> None:
    lm, prompts = random_model(length=6), random_prompts(n=40)
    stacked = StackedTranscoders(TranscoderConfig(k=3, expansion=2, prediction_head="dense"), 2, lm.d_model, 0)
    tokens, keep = prompts.tokens[:, 0], prompts.slots[:, 0] >= 0
    x = torch.stack([read[keep] for read, _ in site_values(lm, random_transcoders(lm), tokens)])
    scaling = Scaling.of(x)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in stacked.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=g))
    heads = TranscoderTraining(stacked, scaling, scaling)
    result = measure(lm, random_transcoders(lm), heads, EVERYTHING, prompts, n_slots=3)
    w = {name: value.detach() for name, value in stacked.state_dict().items()}
    f = []
    for i in range(2):
        pre = (x[i] - scaling.mean[i]) * scaling.scale[i] @ w[f"layers.{i}.W_enc"].T + w[f"layers.{i}.b_enc"]
        f.append(torch.where(pre >= pre.sort(dim=1).values[:, [-3]], pre, 0).clamp(min=0))
    guess = (f[0] @ w["heads.0.dense"] + w["heads.0.bias"]).clamp(min=0)
    expected = 1 - (f[1] - guess).square().sum() / (f[1] - f[1].mean(0)).square().sum()
    assert result.quality[0].prediction_r2 == pytest.approx(float(expected), rel=1e-3)
    assert math.isnan(result.quality[1].prediction_r2)


def test_flat_metrics_hold_every_figure_of_every_layer() -> None:
    result = measured()
    flat = flat_metrics(result, ("a", "b", "c"))
    for name in SCALARS:
        values = [getattr(quality, name) for quality in result.quality]
        defined = [value for value in values if not math.isnan(value)]
        for i, value in enumerate(values):
            assert flat.get(f"transcoder.layer{i}.{name}") == (None if math.isnan(value) else value)
        mean = sum(defined) / len(defined) if defined else None
        assert flat.get(f"transcoder.{name}") == pytest.approx(mean)
    assert flat["transcoder.layer1.fvu_by_slot.b"] == result.quality[1].fvu_by_slot[1]
    mean = (result.quality[0].fvu_by_slot[1] + result.quality[1].fvu_by_slot[1]) / 2
    assert flat["transcoder.fvu_by_slot.b"] == pytest.approx(mean)
    assert flat["transcoder.kl_all"] == result.kl and flat["transcoder.loss_recovered_all"] == result.loss_recovered


def test_a_mean_is_over_the_layers_that_have_the_figure() -> None:
    result = measured()
    first, second = result.quality
    half = replace(result, quality=(replace(first, fvu_by_slot=(math.nan, 0.5, math.nan)), second))
    flat = flat_metrics(half, ("a", "b", "c"))
    assert flat["transcoder.fvu_by_slot.a"] == second.fvu_by_slot[0] and "transcoder.layer0.fvu_by_slot.a" not in flat
    none = replace(half, quality=half.quality[:1])
    assert {name for name in flat_metrics(none, ("a", "b", "c")) if name.startswith("transcoder.fvu_by_slot")} == {
        "transcoder.fvu_by_slot.b"
    }


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
