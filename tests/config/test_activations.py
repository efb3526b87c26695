"""Which models may be streamed layer by layer, and which entry point does it."""

from __future__ import annotations

from typing import Any

import pytest

from hagd.config.load import load_config
from hagd.config.run import ExtractConfig, TrainConfig
from hagd.errors import ConfigError
from tests.config.composed import container

STREAMING = "transcoder.activations.layer_streaming=true"


def test_layers_of_a_models_files_are_streamed_in_training() -> None:
    chosen = ("model=pythia_1.4b", "task=ioi", STREAMING)
    assert load_config(TrainConfig, container(*chosen, entry="train")).transcoder.activations.layer_streaming
    with pytest.raises(ConfigError, match=r"layer_streaming must be false here.*only train\.py"):
        load_config(ExtractConfig, container(*chosen))


@pytest.mark.parametrize(
    ("chosen", "kind"), [(("model=gpt2_mini",), "mini"), (("model=smollm2_135m", "task=ioi"), "smollm2")]
)
def test_other_models_are_refused(chosen: tuple[str, ...], kind: str) -> None:
    schema: Any = TrainConfig
    with pytest.raises(ConfigError, match=f"layer_streaming needs the weight files.*found model.kind={kind}"):
        load_config(schema, container(*chosen, STREAMING, entry="train"))
