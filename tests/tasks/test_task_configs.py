"""Every file of `conf/task` describes a task that can be built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from hagd.config.base import Section
from hagd.config.load import load_config
from hagd.config.task import HellaSwag, SymbolicTask, TaskConfig, WinoGrande
from hagd.tasks.build import build_task
from hagd.tasks.records import TaskData

FILES = sorted((Path(__file__).parents[2] / "conf" / "task").glob("*.yaml"))


class Holder(Section):
    task: TaskConfig


def read(path: Path) -> TaskConfig:
    return load_config(Holder, {"task": yaml.safe_load(path.read_text(encoding="utf-8"))}).task


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_spell_out_every_field(path: Path) -> None:
    config = read(path)
    assert isinstance(config, BaseModel)
    assert set(yaml.safe_load(path.read_text(encoding="utf-8"))) == set(type(config).model_fields)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_files_build(
    path: Path, plain_tokenizer: PreTrainedTokenizerBase, check_task: Callable[[TaskData], None]
) -> None:
    config = read(path)
    if isinstance(config, WinoGrande | HellaSwag):
        pytest.skip("needs the hub or local data; built in test_multiple_choice.py")
    task = build_task(config, None if isinstance(config, SymbolicTask) else plain_tokenizer, 0)
    check_task(task)
    assert len(task.discovery) >= 0.9 * config.n_discovery
    assert len(task.validation) >= 0.9 * config.n_validation
