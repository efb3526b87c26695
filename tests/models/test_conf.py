from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from hagd.config.model import ModelConfig

FILES = sorted((Path(__file__).parents[2] / "conf" / "model").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_model_config_is_valid_and_says_every_field(file: Path) -> None:
    values = yaml.safe_load(file.read_text())
    config = TypeAdapter(ModelConfig).validate_python(values)
    assert set(values) == set(type(config).model_fields)
    assert config.name == ("???" if file.stem == "hf" else file.stem)  # named after its path
    assert file.read_text().startswith("# ")
