from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hagd.config.model import PretrainedModel
from hagd.errors import ModelError, OutOfMemoryError
from hagd.models.freezing import frozen_linear
from hagd.models.load import load_model, load_tokenizer
from hagd.models.pretrained import load_pretrained

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
OTHERS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
GROUPED = OTHERS | {"num_key_value_heads": 1, "head_dim": 8}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

SUPPORTED = [
    ("GPT2Config", "GPT2LMHeadModel", GPT2),
    ("GPTNeoXConfig", "GPTNeoXForCausalLM", OTHERS),
    ("LlamaConfig", "LlamaForCausalLM", GROUPED),
    ("MistralConfig", "MistralForCausalLM", GROUPED),
    ("Qwen2Config", "Qwen2ForCausalLM", GROUPED),
    ("Qwen3Config", "Qwen3ForCausalLM", GROUPED),
    ("GemmaConfig", "GemmaForCausalLM", GROUPED),
]


def saved(folder: Path, config: str, model: str, sizes: dict[str, int]) -> Any:
    """A random model and a tokenizer of bytes in `folder`."""
    built = getattr(transformers, model)(getattr(transformers, config)(vocab_size=len(ALPHABET), **sizes, **SPECIAL))
    with torch.no_grad():  # away from the identity gains and zero biases of a new model
        for parameter in built.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    built.save_pretrained(folder)
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(ALPHABET)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return built


def settings(path: Path | str, **changes: Any) -> PretrainedModel:
    return PretrainedModel(name="tiny", path=str(path), **changes)


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    saved(tmp_path / "gpt2", *SUPPORTED[0])
    return tmp_path / "gpt2"


def test_the_tokenizer_alone_is_that_of_the_model(gpt2: Path) -> None:
    alone, lm = load_tokenizer(settings(gpt2), gpt2), load_model(settings(gpt2), gpt2)
    assert lm.tokenizer is not None and lm.tokenizer("a b").input_ids == alone("a b").input_ids
    (gpt2 / "model.safetensors").unlink()
    assert load_tokenizer(settings(gpt2), gpt2).get_vocab() == alone.get_vocab()
    with pytest.raises(ModelError, match=r"model\.path=.*gone: no such folder"):
        load_tokenizer(settings(gpt2 / "gone"), gpt2)


@pytest.mark.parametrize(("config", "model", "sizes"), SUPPORTED, ids=[row[1] for row in SUPPORTED])
def test_each_architecture_gives_its_own_logits(tmp_path: Path, config: str, model: str, sizes: dict[str, int]) -> None:
    original = saved(tmp_path, config, model, sizes).eval()
    lm = load_model(settings(tmp_path), tmp_path / "cache")
    assert lm.tokenizer is not None
    tokens = lm.tokenizer("the 5", return_tensors="pt").input_ids
    assert [lm.token_text(token) for token in tokens[0].tolist()] == list("the 5")
    positions = torch.tensor([[0, 2, 4]])
    with torch.no_grad():
        expected = original(input_ids=tokens).logits[:, [0, 2, 4]]
        torch.testing.assert_close(lm.logits_at(tokens, positions), expected, atol=1e-5, rtol=1e-4)
        with frozen_linear(lm):
            torch.testing.assert_close(lm.logits_at(tokens, positions), expected, atol=1e-5, rtol=1e-4)


def test_precision_is_the_configured_one(gpt2: Path) -> None:
    assert load_pretrained(settings(gpt2, dtype="bfloat16")).embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"model_type": "opt", "architectures": ["OPTForCausalLM"]}, "no adapter for architecture OPTForCausalLM"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no adapter for architecture BertForMaskedLM"),
        ({"model_type": "bert"}, "no adapter for architecture BertLMHeadModel"),
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.py"}}, "no adapter for architecture own"),
        ([], "config.json holds no object"),
    ],
)
def test_architectures_without_adapter_are_refused_before_the_weights(
    tmp_path: Path, description: Any, message: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(description))
    (tmp_path / "model.safetensors").write_text("never read")
    with pytest.raises(ModelError, match=message) as error:
        load_pretrained(settings(tmp_path))
    assert str(error.value).startswith(f"model.path={tmp_path}")


def test_a_truncated_weight_file_is_named(gpt2: Path) -> None:
    file = gpt2 / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model.path=.*weights cannot be loaded .*copy or download the model again"):
        load_pretrained(settings(gpt2))


def test_lacking_tensors_are_not_replaced_by_random_ones(gpt2: Path) -> None:
    state = load_file(gpt2 / "model.safetensors")
    del state["transformer.h.1.mlp.c_fc.weight"]
    save_file(state, gpt2 / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors \(transformer.h.1.mlp.c_fc.weight"):
        load_pretrained(settings(gpt2))


def test_weights_of_another_size_are_refused(gpt2: Path) -> None:
    description = json.loads((gpt2 / "config.json").read_text()) | {"n_embd": 32}
    (gpt2 / "config.json").write_text(json.dumps(description))
    with pytest.raises(ModelError, match=r"fit config.json"):
        load_pretrained(settings(gpt2))


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", "has no config.json"),
        ("model.safetensors", "weights cannot be loaded"),
        ("tokenizer.json", "no usable tokenizer"),
    ],
)
def test_missing_files_are_named(gpt2: Path, file: str, message: str) -> None:
    (gpt2 / file).unlink()
    with pytest.raises(ModelError, match=message):
        load_pretrained(settings(gpt2))


def test_a_revision_of_a_folder_is_refused(gpt2: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.revision=v2: chooses among those of the hub, found the folder "):
        load_tokenizer(settings(gpt2, revision="v2"), gpt2)


def test_a_gpu_that_is_not_there_is_not_blamed_on_the_weights(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.device_map=cuda:1: expected a GPU that PyTorch can use, found none"):
        load_model(settings(gpt2, device_map="cuda:1"), gpt2)


@pytest.mark.parametrize(
    ("device_map", "device"),
    [("cuda:1", "cuda:1"), ("cuda", "cuda"), ("auto", "cuda"), ("cpu", "cpu"), (None, "cpu")],
)
def test_layers_are_streamed_to_the_device_that_is_named(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, device_map: str | None, device: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("hagd.models.pretrained.StreamedLanguageModel", lambda *arguments: arguments)
    config, tokenizer = settings(gpt2, device_map=device_map), load_tokenizer(settings(gpt2), gpt2)
    made: Any = load_pretrained(config, tokenizer=tokenizer, layer_streaming=True)
    assert made[-1] == device


@pytest.mark.parametrize("device_map", ["balnced", "disk"])
def test_layers_are_not_streamed_to_what_is_no_device(
    gpt2: Path, monkeypatch: pytest.MonkeyPatch, device_map: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ModelError, match=rf"model\.device_map={device_map}: expected a device, .* or one of auto, "):
        load_pretrained(settings(gpt2, device_map=device_map), layer_streaming=True)


def test_weights_that_do_not_fit_are_not_called_damaged(gpt2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", too_large)
    with pytest.raises(OutOfMemoryError, match=r"model\.path=.*found too little \(.*\); set model\.dtype=bfloat16, "):
        load_pretrained(settings(gpt2))


def test_a_tokenizer_that_does_not_fit_its_class_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "Qwen2Config", "Qwen2ForCausalLM", GROUPED)
    words = Tokenizer(models.WordLevel({"<unk>": 0, "text": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_pretrained(settings(tmp_path))


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GPT2Tokenizer", "GPTNeoXTokenizer", "GemmaTokenizer"])
def test_a_tokenizer_without_its_vocabulary_is_refused(gpt2: Path, kind: str) -> None:
    """As after a download that was cut off; transformers makes one that maps all text to the unknown token."""
    (gpt2 / "tokenizer.json").unlink()
    (gpt2 / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind, "add_bos_token": True}))
    with pytest.raises(ModelError, match=r"no usable tokenizer .*knows no text"):
        load_pretrained(settings(gpt2))


def test_a_damaged_description_is_named(gpt2: Path) -> None:
    (gpt2 / "config.json").write_text('{"model_type": "gpt2"')
    with pytest.raises(ModelError, match=r"config.json is damaged"):
        load_pretrained(settings(gpt2))


@pytest.mark.parametrize("path", ["/no/such/folder", "./nothing", "a/b/c"])
def test_a_missing_folder_is_no_hub_name(path: str) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        load_pretrained(settings(path))


def test_an_unreachable_hub_fails_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"127.0.0.1 cannot be reached .*set model.path to a local folder") as error:
        load_pretrained(settings("nobody/nothing"))
    assert time.monotonic() - started < 5
    assert "\n" not in str(error.value)


def test_offline_mode_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE is set"):
        load_pretrained(settings("nobody/nothing"))


def test_a_device_map_without_accelerate_is_refused(gpt2: Path) -> None:
    try:
        import accelerate  # noqa: F401
    except ImportError:
        with pytest.raises(ModelError, match=r"model.device_map=auto: needs the package accelerate"):
            load_model(settings(gpt2, device_map="auto"), gpt2)
    else:
        assert load_model(settings(gpt2, device_map="cpu"), gpt2).device.type == "cpu"
