"""The sample of weights that tells a model from others of its label."""

from __future__ import annotations

from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from hagd.models.language_model import LanguageModel
from hagd.models.load import describe_model
from hagd.models.pretrained import load_pretrained
from hagd.models.records import ModelSample
from tests.models.test_pretrained import SUPPORTED, saved, settings


def of(lm: LanguageModel) -> ModelSample:
    values = lm.weight_sample()
    assert values is not None and values.dtype == lm.model.dtype and values.isfinite().all()
    return ModelSample("", values)


@pytest.mark.parametrize("row", SUPPORTED, ids=[row[1] for row in SUPPORTED])
def test_a_copy_has_the_same_in_memory_and_streamed(row: Any, tmp_path: Path) -> None:
    saved(tmp_path / "model", *row).save_pretrained(tmp_path / "model", max_shard_size="8KB")
    first = of(load_pretrained(settings(tmp_path / "model")))
    copytree(tmp_path / "model", tmp_path / "copy")
    for layer_streaming in (False, True):
        copy = load_pretrained(settings(tmp_path / "copy"), layer_streaming=layer_streaming)
        assert torch.equal(of(copy).values, first.values)


@pytest.mark.parametrize("row", SUPPORTED[:3], ids=[row[1] for row in SUPPORTED[:3]])
def test_all_precisions_of_a_model_fit_each_other(row: Any, tmp_path: Path) -> None:
    saved(tmp_path / "model", *row)
    samples = [of(load_pretrained(settings(tmp_path / "model", dtype=d))) for d in ("float32", "bfloat16", "float16")]
    assert all(a.fits(b.values) for a in samples for b in samples)


@pytest.mark.parametrize("row", SUPPORTED, ids=[row[1] for row in SUPPORTED])
def test_a_change_of_any_one_parameter_is_seen(row: Any, tmp_path: Path) -> None:
    saved(tmp_path, *row)
    lm = load_pretrained(settings(tmp_path))
    before = of(lm)
    for parameter in lm.model.parameters():
        kept = parameter.clone()
        parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        assert not before.fits(of(lm).values)
        parameter.copy_(kept)
    assert before.fits(of(lm).values)


def test_another_number_of_parameters_does_not_fit(tmp_path: Path) -> None:
    name, model, sizes = SUPPORTED[0]
    samples = []
    for depth in (1, 2):
        saved(tmp_path / str(depth), name, model, {**sizes, "n_layer": depth})
        samples.append(of(load_pretrained(settings(tmp_path / str(depth)))))
    assert not samples[0].fits(samples[1].values)


def test_a_model_without_values_has_none(tmp_path: Path) -> None:
    saved(tmp_path, *SUPPORTED[0])
    assert describe_model(settings(tmp_path)).weight_sample() is None
