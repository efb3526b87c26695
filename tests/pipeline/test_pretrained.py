"""What a pipeline loads of a pretrained model, and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import AutoTokenizer

from hagd.config.activations import ActivationsConfig
from hagd.config.model import PretrainedModel
from hagd.config.run import PathsConfig, TrainConfig
from hagd.config.task import WinoGrande
from hagd.config.transcoder import TranscoderConfig
from hagd.pipeline.pipeline import Pipeline
from tests.models.test_pretrained import SUPPORTED, saved


@pytest.mark.parametrize("streaming", [False, True])
def test_the_tokenizer_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool) -> None:
    saved(tmp_path / "model", *SUPPORTED[0])
    items = [{"sentence": f"{i} _ is.", "option1": f"a{i}", "option2": f"b{i}", "answer": "1"} for i in range(8)]
    (tmp_path / "items").write_text(json.dumps(items))
    load, loaded = AutoTokenizer.from_pretrained, []

    def watched(*arguments: Any, **options: Any) -> Any:
        loaded.append(arguments)
        return load(*arguments, **options)

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", watched)
    config = TrainConfig(
        model=PretrainedModel(path=str(tmp_path / "model")),
        task=WinoGrande(data_files=str(tmp_path / "items"), n_discovery=4, n_selection=2, n_validation=2),
        transcoder=TranscoderConfig(activations=ActivationsConfig(layer_streaming=streaming)),
        paths=PathsConfig(runs=str(tmp_path / "runs")),
    )
    pipeline = Pipeline(config, Console(quiet=True))
    assert len(pipeline.get("task").discovery) == 4
    assert pipeline.lm.tokenizer is pipeline.tokenizer
    assert len(loaded) == 1
