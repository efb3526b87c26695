"""Whose model dictionaries from elsewhere are: the label and the weights that they recorded."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from hagd.artifacts.codec import save_record
from hagd.artifacts.keys import canonical_json
from hagd.config.model import PretrainedModel
from hagd.config.transcoder import TranscoderConfig
from hagd.errors import ConfigError
from hagd.models.pretrained import load_pretrained
from hagd.pipeline.dictionaries import given, sampled
from hagd.pipeline.pipeline import Pipeline
from hagd.transcoders.records import TranscoderSet
from tests.builders import random_model, random_transcoders, tiny_extract
from tests.models.test_pretrained import SUPPORTED, saved

QUIET = Console(quiet=True)


def options(folder: Path) -> TranscoderConfig:
    return TranscoderConfig(path=str(folder / "found"))


@pytest.fixture
def checkpoints(tmp_path: Path) -> dict[str, PretrainedModel]:
    """`tuned` differs from `first` in nothing but weights, `copy` in nothing but its place; all have one label."""
    found = {name: PretrainedModel(path=str(tmp_path / name / "checkpoint-100")) for name in ("first", "tuned", "copy")}
    model = saved(Path(found["first"].path), *SUPPORTED[0])
    shutil.copytree(found["first"].path, found["copy"].path)
    shutil.copytree(found["first"].path, found["tuned"].path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.save_pretrained(found["tuned"].path)
    return found


def recorded(model: PretrainedModel, folder: Path) -> TranscoderSet:
    """Dictionaries of a model in HAGD's layout in `folder`, with its weights recorded."""
    lm = load_pretrained(model)
    found = replace(random_transcoders(lm), trained_on=sampled(model, lm))
    save_record(found, folder)
    return found


def test_dictionaries_for_other_weights_of_the_same_label_are_refused_with_both_named(
    checkpoints: dict[str, PretrainedModel], tmp_path: Path
) -> None:
    found = recorded(checkpoints["first"], tmp_path / "found")
    first, tuned = checkpoints["first"], checkpoints["tuned"]
    assert found.model == first.name == tuned.name == "checkpoint-100"
    both = rf"for model checkpoint-100 \({tuned.path}\), found ones for checkpoint-100 with other weights"
    for changes in ({}, {"dtype": "bfloat16"}):
        model = tuned.model_copy(update=changes)
        with pytest.raises(ConfigError, match=rf"{both}; choose the model .* \(transcoder\.path=null\)"):
            given(options(tmp_path), model, load_pretrained(model))
    named = tuned.model_copy(update={"name": "tuned", "path": str(Path(tuned.path).rename(tmp_path / "other"))})
    with pytest.raises(ConfigError, match=r"for model tuned \(.*other\), found ones for .* with other weights; choose"):
        given(options(tmp_path), named, load_pretrained(named))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_copied_model_takes_the_dictionaries_of_the_first_whatever_it_is_called(
    dtype: str, checkpoints: dict[str, PretrainedModel], tmp_path: Path
) -> None:
    found = recorded(checkpoints["first"], tmp_path / "found")
    renamed = Path(checkpoints["copy"].path).rename(tmp_path / "renamed")
    copy = PretrainedModel(path=str(renamed), dtype=dtype)
    taken = given(options(tmp_path), copy, load_pretrained(copy))
    assert taken.model == "renamed" != found.model
    assert taken.trained_on is not None and found.trained_on is not None
    assert torch.equal(taken.trained_on.values, found.trained_on.values)


def test_files_name_no_folder_of_whoever_trained_them(checkpoints: dict[str, PretrainedModel], tmp_path: Path) -> None:
    recorded(checkpoints["first"], tmp_path / "found")
    assert str(tmp_path) not in (tmp_path / "found" / "record.json").read_text()


def test_slightly_other_weights_of_another_name_are_refused_in_a_lower_precision(
    checkpoints: dict[str, PretrainedModel], tmp_path: Path
) -> None:
    """Each weight is less than a rounding of bfloat16 away, as after a little fine-tuning."""
    recorded(checkpoints["first"], tmp_path / "found")
    lm = load_pretrained(checkpoints["first"])
    for parameter in lm.model.parameters():
        parameter.mul_(1 + 2**-14)
    lm.model.save_pretrained(checkpoints["tuned"].path)
    other = checkpoints["tuned"].model_copy(update={"dtype": "bfloat16", "name": "other"})
    with pytest.raises(ConfigError, match="with other weights"):
        given(options(tmp_path), other, load_pretrained(other))


def test_files_from_before_weights_were_recorded_are_told_apart_by_the_label_alone(
    checkpoints: dict[str, PretrainedModel], tmp_path: Path
) -> None:
    tuned = checkpoints["tuned"]
    save_record(replace(recorded(checkpoints["first"], tmp_path / "found"), trained_on=None), tmp_path / "found")
    file = tmp_path / "found" / "record.json"
    stored = json.loads(file.read_text())
    del stored["content"]["fields"]["trained_on"]
    stored["content_sha256"] = hashlib.sha256(canonical_json(stored["content"]).encode()).hexdigest()
    file.write_text(json.dumps(stored))
    assert given(options(tmp_path), tuned, load_pretrained(tuned)).trained_on is None
    other = tuned.model_copy(update={"path": str(Path(tuned.path).rename(tmp_path / "other")), "name": "other"})
    with pytest.raises(
        ConfigError, match=r"for model other \(.*other\), found ones for checkpoint-100; .*model\.name="
    ):
        given(options(tmp_path), other, load_pretrained(other))


def test_trained_dictionaries_record_their_model(tiny_runs: Path) -> None:
    first = Pipeline(tiny_extract(tiny_runs), QUIET)
    trained: TranscoderSet = first.get("transcoders")
    assert trained.trained_on is not None and trained.trained_on.path == ""
    stored = tiny_extract(tiny_runs, transcoder__path=str(first.used["transcoders"].path))
    assert Pipeline(stored, QUIET).get("transcoders").trained_on.fits(trained.trained_on.values)
    other = Pipeline(tiny_extract(tiny_runs, transcoder__path=stored.transcoder.path, seed=1), QUIET)
    with pytest.raises(ConfigError, match=r"for model \S+, found ones for \S+ with other weights"):
        other.get("transcoders")


def test_a_hub_model_is_named_with_its_revision() -> None:
    lm = random_model()
    places = [sampled(PretrainedModel(path="org/model", revision=revision), lm) for revision in (None, "v2")]
    assert [each and each.path for each in places] == ["org/model", "org/model@v2"]
