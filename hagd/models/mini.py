"""Mini models: real `transformers` classes with small configurations, built here and trained by this project."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hagd.config.model import MiniModel
from hagd.errors import ModelError
from hagd.models.language_model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INIT_STD = 0.08
"""Standard deviation of initial weights; `transformers`' 0.02 is meant for widths near 1,000 and learns parity late."""


def build_mini(config: MiniModel, vocab_size: int, n_positions: int, seed: int) -> LanguageModel:
    """An untrained mini model: no dropout, no special tokens, untied unembedding.

    Args:
        config: sizes and architecture.
        vocab_size: tokens of the task.
        n_positions: longest sequence.
        seed: decides every initial weight; the global random state is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(config, vocab_size, n_positions)
    return LanguageModel(model, name=config.name)


def mini_state(lm: LanguageModel) -> dict[str, Tensor]:
    """Every weight of a mini model by its name, detached and on the CPU, as `mini_from_state` takes it."""
    return {name: value.detach().cpu().clone() for name, value in lm.model.state_dict().items()}


def mini_from_state(config: MiniModel, vocab_size: int, n_positions: int, state: dict[str, Tensor]) -> LanguageModel:
    """The mini model whose weights are `state`.

    Raises:
        ModelError: `state` is that of a model of other sizes or another architecture.
    """
    lm = build_mini(config, vocab_size, n_positions, seed=0)
    try:
        lm.model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"model {config.name}: stored weights do not fit model.architecture={config.architecture}, "
            f"d_model={config.d_model}, n_layers={config.n_layers}, vocabulary {vocab_size}: "
            f"{' '.join(str(error).split())[:300]}; train the model again"
        ) from None
    return lm


def _build(config: MiniModel, vocab_size: int, n_positions: int) -> PreTrainedModel:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        GPTNeoXConfig,
        GPTNeoXForCausalLM,
        LlamaConfig,
        LlamaForCausalLM,
    )

    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        "initializer_range": INIT_STD,
        "attn_implementation": "eager",
    }
    # Llama and NeoX name their sizes alike; GPT-2 has names and dropouts of its own.
    sizes: dict[str, Any] = {
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "intermediate_size": config.d_mlp,
        "max_position_embeddings": n_positions,
    }
    match config.architecture:
        case "gpt2":
            config_gpt2 = GPT2Config(
                n_positions=n_positions,
                n_embd=config.d_model,
                n_layer=config.n_layers,
                n_head=config.n_heads,
                n_inner=config.d_mlp,
                activation_function="gelu_pytorch_tanh",  # GPT-2's own in one kernel
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
            return GPT2LMHeadModel(config_gpt2)
        case "gpt_neox":
            # Pythia rotates a quarter of its 64 or more dimensions a head; a head here has about as many in all.
            rotary = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0}
            return GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **common, rope_parameters=rotary))
        case "llama":
            return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=config.n_kv_heads, **common))
