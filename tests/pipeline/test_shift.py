"""Prompts of other wordings in a whole extraction of a text task."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from hagd.config.load import load_config
from hagd.config.run import ExtractConfig
from hagd.pipeline.extraction import run_extraction
from hagd.pipeline.job_key import job_key
from hagd.pipeline.measurements import measurements
from hagd.pipeline.pipeline import Pipeline
from tests.builders import tiny_settings
from tests.tasks.conftest import byte_level

QUIET = Console(quiet=True)
TASK = {"name": "factual_recall", "relation": "continent", "only_correct": False}
SIZES = {"n_discovery": 60, "n_selection": 15, "n_validation": 25}


def recalled(root: Path, tokenizer: PreTrainedTokenizerBase | None = None, **changes: Any) -> ExtractConfig:
    """A random GPT-2 that knows nothing, as a user's own model."""
    if tokenizer is not None:
        shape = GPT2Config(
            vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, bos_token_id=None, eos_token_id=None
        )
        GPT2LMHeadModel(shape).save_pretrained(root / "model")
        tokenizer.save_pretrained(root / "model")
    settings = tiny_settings(root / "runs")
    model_of = {"kind": "pretrained", "name": "own", "path": str(root / "model")}
    validation = {**settings["validation"], **changes}
    return load_config(
        ExtractConfig, {**settings, "model": model_of, "task": {**TASK, **SIZES}, "validation": validation}
    )


@pytest.mark.usefixtures("undrawn")
def test_their_figures_are_in_every_result(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "hagd.pipeline")
    config = recalled(tmp_path, byte_level())
    metrics = run_extraction(config, tmp_path / "one", None, QUIET)
    assert 0 < metrics["shift.n_prompts"] <= 25
    assert {"shift.preservation", "shift.random.preservation", "shift.attribution.preservation"} <= set(metrics)
    assert "Other wordings, prompts" in (tmp_path / "one" / "report.html").read_text()
    slots = json.loads((tmp_path / "one" / "circuit.json").read_text())["slots"]
    assert slots[0] == "first" and slots[-1] == "last" and slots.index("subject_rest") < slots.index("subject")
    stages = json.loads((tmp_path / "one" / "manifest.json").read_text())["stages"]
    assert not stages["shift"]["reused"]

    without = recalled(tmp_path, shift=False)
    assert measurements(config) == ("shift",) and measurements(without) == ()
    assert job_key(config) != job_key(without)
    assert Pipeline(config, QUIET).key("validation") == Pipeline(without, QUIET).key("validation")
    assert not any(name.startswith("shift") for name in run_extraction(without, tmp_path / "two", None, QUIET))
    fewer = "task factual_recall: validation: 24 of 25 prompts; the others have no counterfactual"
    assert sum(fewer in record.getMessage() for record in caplog.records) == 2


def test_tasks_of_one_wording_have_none(tmp_path: Path) -> None:
    assert measurements(load_config(ExtractConfig, tiny_settings(tmp_path))) == ()


@pytest.mark.parametrize("scope", ["task", "prompt"])
def test_the_graph_of_a_prompt_has_none(tmp_path: Path, scope: str) -> None:
    config = recalled(tmp_path).model_dump(mode="json")
    config["graph"] |= {"scope": scope, "prompt": "x" if scope == "prompt" else None}
    assert measurements(load_config(ExtractConfig, config)) == (("shift",) if scope == "task" else ())
