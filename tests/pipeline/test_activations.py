"""Transcoders trained on activations that are kept in different ways, and killed in the middle."""

from __future__ import annotations

import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import Logger
from rich.console import Console
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from hagd.activations import reader
from hagd.activations.shards import ActivationShards
from hagd.config.load import load_config
from hagd.config.run import ExtractConfig
from hagd.errors import ConfigError, HagdError
from hagd.pipeline.pipeline import Pipeline
from hagd.pipeline.progress import StageProgress
from hagd.pipeline.stages import fit_transcoders, select_prompts
from hagd.transcoders.records import TranscoderSet
from tests.builders import prompts_task, random_model, random_prompts, tiny_extract
from tests.models.test_pretrained import SUPPORTED, saved


def trained(runs: Path, work: Path, **changes: object) -> TranscoderSet:
    """Small shards: the 20 epochs of the training visit each of them every few steps."""
    console = Console(quiet=True)
    config = tiny_extract(runs, transcoder__activations__buffer_tokens=100, trainer__checkpoint_every=10, **changes)
    pipeline = Pipeline(config, console)
    with StageProgress("transcoders", console) as progress:
        return fit_transcoders(config, pipeline.lm, pipeline.get("prompts"), work, work, [], progress)


def weights(found: TranscoderSet) -> list[Tensor]:
    return [getattr(t, name) for t in found.transcoders for name in ("W_enc", "b_enc", "W_dec", "b_dec")]


@pytest.fixture(scope="module")
def expected(tiny_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Tensor]:
    return weights(trained(tiny_runs, tmp_path_factory.mktemp("work")))


@pytest.mark.usefixtures("undrawn")
def test_nothing_is_captured_for_a_trainer_that_this_machine_lacks(
    tiny_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hagd.pipeline.stages.collect", lambda *_, **__: pytest.fail("captured"))
    config = tiny_extract(tiny_runs, trainer__accelerator="abacus", transcoder__steps=61)
    with pytest.raises(ConfigError, match=r"trainer: expected settings that this machine can follow, found .*abacus"):
        Pipeline(config, Console(quiet=True)).get("transcoders")


@pytest.mark.parametrize("storage", ["disk", "stream"])
def test_killed_trainings_give_the_same_weights_wherever_activations_are(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: list[Tensor], storage: str
) -> None:
    steps: list[int] = []
    batch = ActivationShards.batch

    def watched(self: ActivationShards, step: int, size: int, **options: Any) -> tuple[Tensor, Tensor]:
        if step == 37 and 37 not in steps:
            steps.append(step)
            raise ConnectionAbortedError("power cut")
        steps.append(step)
        return batch(self, step, size, **options)

    monkeypatch.setattr(ActivationShards, "batch", watched)
    with pytest.raises(ConnectionAbortedError):
        trained(tiny_runs, tmp_path, transcoder__activations__storage=storage)
    assert len(list((tmp_path / "activations").glob("*.safetensors"))) == (0 if storage == "stream" else 6)
    found = weights(trained(tiny_runs, tmp_path, transcoder__activations__storage=storage))
    assert 30 in steps[steps.index(37) :] and 29 not in steps[steps.index(37) :]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Terminal(Logger):
    """Notes how much was drawn on a terminal whenever a training logs, a refresh of the bars later."""

    name, version = "terminal", 0

    def __init__(self) -> None:
        super().__init__()
        self.screen = StringIO()
        self.drawn: list[int] = []

    def log_hyperparams(self, params: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        time.sleep(0.25)
        self.drawn.append(len(self.screen.getvalue()))


@pytest.mark.slow
def test_the_bar_of_the_capture_makes_room_for_that_of_the_training(tiny_runs: Path, tmp_path: Path) -> None:
    terminal = Terminal()
    console = Console(file=terminal.screen, force_terminal=True)
    config = tiny_extract(tiny_runs, transcoder__steps=100)
    pipeline = Pipeline(config, Console(quiet=True))
    prompts = pipeline.get("prompts")
    with StageProgress("transcoders", console) as progress:
        fit_transcoders(config, pipeline.lm, prompts, tmp_path, tmp_path, [terminal], progress)
    assert "activations" in terminal.screen.getvalue()
    assert len(terminal.drawn) > 1 and len(set(terminal.drawn)) == 1


def test_kept_activations_are_those_of_later_trainings(
    tiny_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sweep over k captures once, and its results are those of a training alone."""
    small = {"transcoder__steps": 10, "transcoder__activations__buffer_tokens": 100}

    def transcoders(k: int, runs: Path, **changes: object) -> list[Tensor]:
        config = tiny_extract(runs, transcoder__k=k, **small, **changes)
        return weights(Pipeline(config, Console(quiet=True)).get("transcoders"))

    alone = transcoders(3, tmp_path / "alone")
    transcoders(2, tmp_path / "swept", transcoder__activations__keep=True)
    (folder,) = (tmp_path / "swept" / "activations").iterdir()
    assert list((folder / "activations").glob("*.safetensors"))

    def refuse(*_: object) -> None:
        raise AssertionError("captured again")

    monkeypatch.setattr(reader, "visit", refuse)
    swept = transcoders(3, tmp_path / "swept", transcoder__activations__keep=True)
    assert all(torch.equal(one, other) for one, other in zip(alone, swept, strict=True))
    with pytest.raises(AssertionError, match="captured again"):
        transcoders(3, tmp_path / "swept", transcoder__activations__keep=True, transcoder__site="resid")


def test_half_precision_is_near(tiny_runs: Path, tmp_path: Path, expected: list[Tensor]) -> None:
    found = trained(tiny_runs, tmp_path, transcoder__activations__dtype="bfloat16")
    assert not any(torch.equal(a, b) for a, b in zip(weights(found), expected, strict=True))
    assert all(layer.fvu < 1 for layer in found.quality)


def test_the_text_of_a_corpus_is_part_of_the_key(tmp_path: Path) -> None:
    saved(tmp_path / "model", *SUPPORTED[0])
    text = tmp_path / "text.txt"
    text.write_text("some text")
    corpus = {"data_files": str(tmp_path / "*.txt"), "n_tokens": 4, "context": 4}
    model = {"kind": "pretrained", "name": "tiny", "path": str(tmp_path / "model")}
    sections = {"model": model, "task": {"name": "ioi"}, "transcoder": {"corpus": corpus}}

    def key() -> str:
        return Pipeline(load_config(ExtractConfig, sections), Console(quiet=True)).key("transcoders")

    first = key()
    assert key() == first
    text.write_text("some other text")
    assert key() != first


@pytest.mark.parametrize(
    ("n_positions", "message"),
    [
        (16, r"transcoder.corpus.context: expected at most 16 tokens a sequence, .* found 17; lower it"),
        (3, r"task random: expected prompts of at most 3 tokens, which model tiny was built for, found \d+; choose"),
    ],
)
def test_sequences_that_are_too_long_for_the_model_are_refused(tmp_path: Path, n_positions: int, message: str) -> None:
    """Not left to the embedding of positions, or to angles that rotary models never saw."""
    lm = random_model(length=n_positions)
    lm.name, lm.tokenizer = "tiny", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    text = tmp_path / "text.txt"
    text.write_text("some text")
    sections = {
        "model": {"kind": "pretrained", "name": "tiny", "path": "."},
        "task": {"name": "ioi", "only_correct": False},
        "transcoder": {"corpus": {"data_files": str(text), "context": 17}},
    }
    config = load_config(ExtractConfig, sections)
    prompts = prompts_task(random_prompts())
    with StageProgress("transcoders", Console(quiet=True)) as progress, pytest.raises(HagdError, match=message):
        task = select_prompts(config, lm, prompts)
        fit_transcoders(config, lm, task, tmp_path, tmp_path, [], progress)


def test_the_way_of_keeping_decides_no_result(tiny_runs: Path) -> None:
    def key(**changes: object) -> str:
        return Pipeline(tiny_extract(tiny_runs, **changes), Console(quiet=True)).key("transcoders")

    same = {"storage": "stream", "memory_mb": 7, "disk_mb": 7, "keep": True}
    assert {key(**{f"transcoder__activations__{name}": value}) for name, value in same.items()} == {key()}
    for name, value in {"buffer_tokens": 100, "dtype": "bfloat16"}.items():
        assert key(**{f"transcoder__activations__{name}": value}) != key()
