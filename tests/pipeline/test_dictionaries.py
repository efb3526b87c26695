"""Dictionaries from elsewhere in the pipeline, and copies for elsewhere."""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from hagd.artifacts.codec import save_record
from hagd.config.model import MiniModel, PretrainedModel
from hagd.config.run import ExportConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel
from hagd.pipeline.dictionaries import export, given, read
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.training import run_training
from hagd.transcoders.formats import circuit_tracer, saelens, sparsify
from hagd.transcoders.formats.checks import in_precision
from hagd.transcoders.loaded import held, shown_config
from hagd.transcoders.records import TranscoderSet
from tests.builders import random_model, random_transcoders, tiny_extract, tiny_train
from tests.transcoders.formats.layers import assert_same_bits

QUIET = Console(quiet=True)
MODEL = MiniModel(name="tiny", d_model=16)


def no_sections(group: str, name: str) -> dict[str, Any]:
    raise AssertionError("only the scorer's training reads other configurations")


def options(path: Path, **changes: Any) -> TranscoderConfig:
    return TranscoderConfig(path=str(path), **changes)


@pytest.fixture
def lm() -> LanguageModel:
    """Two layers, 16 wide, named `tiny`."""
    return random_model("gpt2")


def with_thresholds(found: TranscoderSet) -> TranscoderSet:
    """JumpReLU in place of TopK, and decoders into later layers."""
    n = len(found.transcoders)

    def changed(place: int) -> Any:
        each = found.transcoders[place]
        later = tuple(each.W_dec * (2 + i) for i in range(n - place - 1))
        return replace(each, k=None, threshold=each.b_enc.abs(), W_later=later)

    return replace(found, transcoders=tuple(changed(i) for i in range(n)))


@pytest.mark.parametrize("layout", ["hagd", "sparsify", "saelens"])
def test_a_copy_is_measured_as_what_it_was_copied_from(layout: str, tiny_runs: Path, tmp_path: Path) -> None:
    copy = {"format": layout, "path": str(tmp_path / "copy")}
    trained = run_training(tiny_train(tiny_runs, export=copy), no_sections, tmp_path / "trained", None, QUIET)
    config = tiny_train(tiny_runs, transcoder__path=str(tmp_path / "copy"), transcoder__steps=1)
    measured = run_training(config, no_sections, tmp_path / "measured", None, QUIET)
    quality = {
        key: value for key, value in trained.items() if key.startswith("transcoder.") and "prediction" not in key
    }
    assert {key: value for key, value in measured.items() if key.startswith("transcoder.")} == pytest.approx(quality)
    manifest = json.loads((tmp_path / "measured" / "manifest.json").read_text())["stages"]
    assert manifest["lm"]["reused"] and not manifest["transcoders"]["reused"]
    run_training(
        tiny_train(tiny_runs, transcoder__path=str(tmp_path / "copy")), no_sections, tmp_path / "x", None, QUIET
    )
    assert json.loads((tmp_path / "x" / "manifest.json").read_text())["stages"]["transcoders"]["reused"]


def test_a_circuit_of_dictionaries_from_elsewhere(tiny_runs: Path, tmp_path: Path) -> None:
    trained: TranscoderSet = Pipeline(tiny_extract(tiny_runs), QUIET).get("transcoders")
    circuit_tracer.save(with_thresholds(replace(trained, quality=())), tmp_path / "clt")
    config = tiny_extract(tiny_runs, transcoder__path=str(tmp_path / "clt"), transcoder__k=32)
    metrics = run_extraction(config, tmp_path / "run", None, QUIET)
    assert 0 <= metrics["circuit.nodes"] <= 8
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["dictionaries"] == held(read(str(tmp_path / "clt")))
    page = (tmp_path / "run" / "report.html").read_text()
    for key, value in {"activation": "jumprelu", "cross_layer": "True", "k": "null", "m": "64"}.items():
        assert re.search(rf"transcoder\.{key}</th><td[^>]*>{value}<", page), key
    assert "transcoder.steps" not in page


def test_settings_that_the_files_contradict_are_refused(lm: LanguageModel, tmp_path: Path) -> None:
    topk = random_transcoders(lm, m=32)
    sparsify.save(topk, tmp_path / "topk")
    circuit_tracer.save(with_thresholds(topk), tmp_path / "clt")
    for changes, problem in (
        ({"k": 5}, r"transcoder\.k=4, found 5 \(default 32\); the files decide"),
        ({"k": 4, "expansion": 3}, r"expected transcoder\.expansion=2, found 3 "),
        ({"activation": "relu", "skip": True}, r"activation=topk, found relu .*; transcoder\.skip=False, found True"),
        ({"cross_layer": True}, r"cross_layer=False, found True"),
    ):
        with pytest.raises(ConfigError, match=problem):
            given(options(tmp_path / "topk", **changes), MODEL, lm)
    with pytest.raises(ConfigError, match=r"expected transcoder\.activation=jumprelu, found relu"):
        given(options(tmp_path / "clt", k=4, activation="relu"), MODEL, lm)  # where thresholds decide, k is as trained
    given(options(tmp_path / "topk", k=4, expansion=2, activation="topk"), MODEL, lm)
    given(options(tmp_path / "topk", k=32, expansion=4), MODEL, lm)
    given(options(tmp_path / "clt", activation="jumprelu", cross_layer=True, expansion=2), MODEL, lm)
    first, second = topk.transcoders
    sparsify.save(replace(topk, transcoders=(first, replace(second, k=9))), tmp_path / "mixed")
    given(options(tmp_path / "mixed", layers=(1,), k=9), MODEL, lm)
    with pytest.raises(ConfigError, match=r"transcoder\.k=\[4, 9\], found 9"):
        given(options(tmp_path / "mixed", k=9), MODEL, lm)


def test_thresholds_tell_their_activation(lm: LanguageModel) -> None:
    found = with_thresholds(random_transcoders(lm))

    def activation(*thresholds: float) -> Any:
        layers = zip(found.transcoders, thresholds, strict=True)
        changed = tuple(replace(each, threshold=torch.full((12,), value)) for each, value in layers)
        return held(replace(found, transcoders=changed))["activation"]

    assert held(found)["activation"] == "jumprelu" and activation(0.5, 0.2) == "batch_topk"
    assert activation(0, 0) == "relu" and activation(0, 0.5) == ["relu", "batch_topk"]


def test_unread_settings_are_not_shown(tmp_path: Path) -> None:
    shown = shown_config(tiny_extract(tmp_path, transcoder__path="somewhere"), None)
    assert set(shown["transcoder"]) == {"path", "site", "layers", "fvu_warning"}
    config = tiny_extract(tmp_path)
    assert shown_config(config, None) == config.model_dump(mode="json")


def test_a_copy_that_cannot_be_written_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    copy = {"format": "hagd", "path": str(tmp_path / "file" / "copy")}
    with pytest.raises(ConfigError, match=r"export\.path: expected a folder that can be written, found .*file/copy \("):
        run_training(tiny_train(tmp_path / "runs", export=copy), no_sections, tmp_path / "run", None, QUIET)
    assert not (tmp_path / "runs").exists() and not (tmp_path / "run").exists()


def test_the_key_follows_the_files_and_nothing_else(lm: LanguageModel, tiny_runs: Path, tmp_path: Path) -> None:
    saelens.save(random_transcoders(lm), tmp_path / "found")

    def key(**changes: Any) -> str:
        changes = {"transcoder__path": str(tmp_path / "found"), **changes}
        return Pipeline(tiny_extract(tiny_runs, **changes), QUIET).key("transcoders")

    first = key()
    assert key(transcoder__steps=7) == first != key(transcoder__layers=[0])
    assert key(transcoder__k=9) != first, "what the files contradict is refused, not reused"
    (tmp_path / "found").rename(tmp_path / "moved")
    assert key(transcoder__path=str(tmp_path / "moved")) == first
    file = next((tmp_path / "moved").rglob("cfg.json"))
    os.utime(file, ns=(1, 1))
    assert key(transcoder__path=str(tmp_path / "moved")) != first


def test_every_layout_is_recognised(lm: LanguageModel, tmp_path: Path) -> None:
    topk = random_transcoders(lm)
    jump = with_thresholds(topk)
    save_record(topk, tmp_path / "hagd")
    sparsify.save(topk, tmp_path / "sparsify")
    saelens.save(topk, tmp_path / "saelens")
    circuit_tracer.save(jump, tmp_path / "circuit_tracer")
    for layout in ("hagd", "sparsify", "saelens", "circuit_tracer"):
        assert_same_bits(read(str(tmp_path / layout)), jump if layout == "circuit_tracer" else topk)
    with pytest.raises(
        ConfigError, match=r"transcoder\.path: expected record\.json \(HAGD\), .* found none of them in"
    ):
        read(str(tmp_path))


def test_a_missing_or_unknown_folder_is_named_before_anything_is_computed(tmp_path: Path) -> None:
    pipeline = Pipeline(tiny_extract(tmp_path, transcoder__path="nowhere"), QUIET)
    with pytest.raises(
        ConfigError, match=r"transcoder\.path: expected a folder with dictionaries, found /.*/nowhere, which"
    ):
        pipeline.get("report")
    assert not pipeline.used and not (tmp_path / "artifacts").exists()
    with pytest.raises(ConfigError, match=r"found none of them in"):
        Pipeline(tiny_extract(tmp_path, transcoder__path=str(tmp_path)), QUIET).get("report")


def test_dictionaries_for_another_model_are_refused_with_both_named(lm: LanguageModel, tmp_path: Path) -> None:
    saelens.save(replace(random_transcoders(lm), model="org/Other-Model"), tmp_path / "found")
    with pytest.raises(ConfigError, match=r"trained for model tiny, found ones for org/Other-Model; .*model\.name="):
        given(options(tmp_path / "found"), MODEL, lm)
    same = PretrainedModel(name="tiny", path="mirror/other-model")
    assert given(options(tmp_path / "found"), same, lm).model == "tiny"
    lm.name = "other-model"
    assert given(options(tmp_path / "found"), MODEL, lm).model == "other-model"


def test_a_layout_without_a_model_name_is_taken_with_a_warning(
    lm: LanguageModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sparsify.save(random_transcoders(lm), tmp_path / "found")
    (tmp_path / "found" / "config.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert given(options(tmp_path / "found"), MODEL, lm).model == "tiny"
    assert "does not say for which model the dictionaries were trained; taking tiny" in caplog.text


def test_another_site_width_or_precision_is_refused_with_both_named(lm: LanguageModel, tmp_path: Path) -> None:
    saelens.save(random_transcoders(lm, site="resid"), tmp_path / "resid")
    with pytest.raises(
        ConfigError, match=r"site mlp \(transcoder\.site\), found ones of site resid; set transcoder=resid"
    ):
        given(options(tmp_path / "resid"), MODEL, lm)
    assert given(options(tmp_path / "resid", site="resid"), MODEL, lm).site == "resid"
    found = random_transcoders(lm)
    narrow = [replace(t, W_enc=t.W_enc[:, 1:], W_dec=t.W_dec[:, 1:], b_dec=t.b_dec[1:]) for t in found.transcoders]
    saelens.save(replace(found, transcoders=tuple(narrow)), tmp_path / "narrow")
    with pytest.raises(ConfigError, match=r"for d_model = 16 of model tiny, found ones for 15"):
        given(options(tmp_path / "narrow"), MODEL, lm)
    half = [in_precision(each, torch.bfloat16) for each in found.transcoders]
    saelens.save(replace(found, transcoders=tuple(half)), tmp_path / "half")
    with pytest.raises(
        ConfigError, match=r"in float32 or in float32 \(model\.dtype\), found bfloat16; set model\.dtype="
    ):
        given(options(tmp_path / "half"), MODEL, lm)
    lm.model.to(torch.bfloat16)
    (first, _) = given(options(tmp_path / "half"), MODEL, lm).transcoders
    assert first.W_enc.dtype == torch.float32 and torch.equal(first.W_enc, half[0].W_enc.float())


def test_layers_are_chosen_or_refused(lm: LanguageModel, tmp_path: Path) -> None:
    found = random_transcoders(lm)
    saelens.save(found, tmp_path / "found")
    chosen = given(options(tmp_path / "found", layers=(1,)), MODEL, lm)
    assert chosen.layers == (1,) and torch.equal(chosen.transcoders[0].W_enc, found.transcoders[1].W_enc)
    with pytest.raises(ConfigError, match=r"of layers \[1, 2\] for a model of 2 layers, found layers \[0, 1\]; set"):
        given(options(tmp_path / "found", layers=(1, 2)), MODEL, lm)
    deep = [replace(each, layer=each.layer + 1) for each in found.transcoders]
    saelens.save(replace(found, transcoders=tuple(deep)), tmp_path / "deep")
    with pytest.raises(ConfigError, match=r"of layers \[1, 2\] for a model of 2 layers, found layers \[1, 2\]"):
        given(options(tmp_path / "deep"), MODEL, lm)
    circuit_tracer.save(with_thresholds(found), tmp_path / "clt")
    with pytest.raises(
        ConfigError, match=r"all layers \[0, 1\] of a cross-layer transcoder, found transcoder\.layers=\[1"
    ):
        given(options(tmp_path / "clt", layers=(1,)), MODEL, lm)


@pytest.mark.parametrize(("architecture", "names"), [("gpt2", "h.0.mlp"), ("llama", "layers.0.mlp")])
def test_a_copy_for_sparsify_names_the_modules_of_the_architecture(
    architecture: Any, names: str, tmp_path: Path
) -> None:
    lm = random_model(architecture)
    copy = ExportConfig(format="sparsify", path=str(tmp_path / "out"))
    export(random_transcoders(lm), copy, PretrainedModel(name="tiny", path="org/model"), lm)
    assert (tmp_path / "out" / names / "cfg.json").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model": "org/model"}


def test_a_folder_with_content_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    config = tiny_train(tmp_path / "runs", export={"format": "sparsify", "path": str(tmp_path / "copy")})
    with pytest.raises(ConfigError, match=r"export\.path: expected a new or empty folder"):
        run_training(config, no_sections, tmp_path / "run", None, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    ("copy", "changes", "message"),
    [
        (
            {"format": "saelens"},
            {},
            "export.format and path belong together, found format=saelens, path=None; set both",
        ),
        ({"path": "x"}, {}, "export.format and path belong together, found format=None, path=x"),
        ({"format": "saelens", "path": "x"}, {"stage": "lm"}, "export copies dictionaries, found stage=lm"),
        (
            {"format": "circuit_tracer", "path": "x"},
            {},
            "circuit_tracer has no place for transcoder.activation=topk; choose batch_topk, jumprelu or relu",
        ),
        (
            {"format": "circuit_tracer", "path": "x"},
            {"transcoder__site": "resid"},
            "no place for transcoder.site=resid",
        ),
        (
            {"format": "circuit_tracer", "path": "x"},
            {"transcoder__cross_layer": True, "transcoder__skip": True},
            "export.format=circuit_tracer has no cross-layer skip",
        ),
        (
            {"format": "circuit_tracer", "path": "x"},
            {"transcoder__activation": "relu", "transcoder__layers": (1,)},
            "holds every layer from 0 up, found transcoder.layers=[1]; set it to null",
        ),
        (
            {"format": "sparsify", "path": "x"},
            {"transcoder__activation": "relu"},
            "sparsify has no place for transcoder.activation=relu",
        ),
        (
            {"format": "saelens", "path": "x"},
            {"transcoder__skip": True},
            "export.format=saelens has no TopK with a skip",
        ),
        (
            {"format": "saelens", "path": "x"},
            {"transcoder__cross_layer": True},
            "saelens has no cross-layer dictionaries",
        ),
    ],
)
def test_copies_that_cannot_be_are_refused_by_the_configuration(
    copy: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as problem:
        tiny_train(tmp_path, export=copy, **changes)
    assert message in str(problem.value)


def test_what_is_read_decides_what_can_be_copied(tmp_path: Path) -> None:
    copy = {"format": "circuit_tracer", "path": "x"}
    assert tiny_train(tmp_path, export=copy, transcoder__path="somewhere").transcoder.activation == "topk"
