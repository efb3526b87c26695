"""A causal language model with named sites.

Shape legend: B sequences, T positions, A scored positions, d = d_model, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hagd.errors import ModelError
from hagd.models.adapter import Adapter
from hagd.models.architectures import all_adapters

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_A_PASS = 8192
"""Positions that go through a layer together where nobody says otherwise."""

_SAMPLED = 32
"""Entries of a parameter in `LanguageModel.weight_sample`."""

_STRIDE = 2_654_435_761
"""Between two of them, modulo the parameter's size; prime, so that they are spread over rows and columns."""


def rows_a_pass(length: int) -> int:
    """Sequences of `length` positions that go through a layer together, at least one."""
    return max(1, TOKENS_A_PASS // length)


class LanguageModel:
    """A frozen `transformers` model, its adapter and its tokenizer (None for symbolic vocabularies)."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, name: str = "model"
    ) -> None:
        self.adapter = adapter_for(model)
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.model.config.hidden_size)

    @property
    def n_layers(self) -> int:
        """Transformer blocks."""
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        """Rows of the unembedding."""
        return int(self.model.config.vocab_size)

    @property
    def n_positions(self) -> int:
        """Longest sequence that the model was built for."""
        return int(self.model.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Device of the embedding, where token ids go, and of all that is not the model's: dictionaries, gates, means.

        Layers may be on others (`model.device_map=auto`); hooks bring what they read here, and back what they write.
        """
        return self.embedding.weight.device

    @property
    def streams_layers(self) -> bool:
        """Whether each forward pass reads the weights anew, so that a few large ones are better than many."""
        return False

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a layer read the same."""
        return self.adapter.name == "gpt_neox" and bool(getattr(self.model.config, "use_parallel_residual", True))

    @property
    def layers(self) -> nn.ModuleList:
        """The transformer blocks."""
        return self._get(self.adapter.layers)

    @property
    def embedding(self) -> nn.Embedding:
        """The token embedding."""
        return self._get(self.adapter.embedding)

    @property
    def unembedding(self) -> nn.Module:
        """The map from the final-normed residual stream to logits."""
        return self._get(self.adapter.unembedding)

    def mlp(self, layer: int) -> nn.Module:
        """The MLP of a layer."""
        return self.layers[layer].get_submodule(self.adapter.mlp)

    def attention_output(self, layer: int) -> nn.Module:
        """What projects the outputs of a layer's heads, side by side, to the residual stream."""
        return self.layers[layer].get_submodule(self.adapter.attention).get_submodule(self.adapter.attention_output)

    def norms(self) -> list[nn.Module]:
        """Every normalisation of the residual stream."""
        per_layer = (self.adapter.attention_norm, self.adapter.mlp_norm)
        return [layer.get_submodule(path) for layer in self.layers for path in per_layer] + [
            self._get(self.adapter.final_norm)
        ]

    def hidden(self, tokens: Tensor) -> Tensor:
        """Final-normed residual stream `[B, T, d]` for `tokens` `[B, T]`."""
        return self._get(self.adapter.backbone)(input_ids=tokens, use_cache=False).last_hidden_state

    def logits_at(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Next-token logits `[B, A, V]` at `positions` `[B, A]` only; negative positions give those of 0.

        On the device of `tokens`, wherever the last layers are.
        """
        hidden = self.hidden(tokens)
        index = positions.clamp(min=0)[..., None].expand(-1, -1, hidden.shape[-1])
        return self.unembedding(hidden.gather(1, index.to(hidden.device))).to(tokens.device).float()

    def weight_sample(self) -> Tensor | None:
        """Some entries of every parameter, `[n]` on the CPU in the model's precision: the same for every copy.

        None where parameters have no values here, as of a model that is only described or that accelerate offloads.
        """
        tied = f"{self.adapter.unembedding}.weight" if self.model.config.tie_word_embeddings else None
        entries = torch.arange(_SAMPLED) * _STRIDE
        found = []
        for name in (name for name, _ in self.model.named_parameters() if name != tied):
            values = self._parameter(name)
            if values.is_meta:
                return None
            places = (entries % values.numel()).to(values.device)
            found.append(values.flatten()[places].to(self.model.dtype).cpu())
        return torch.cat(found)

    def token_text(self, token: int) -> str:
        """Text of one token of a tokenizer's vocabulary."""
        if self.tokenizer is None:
            raise ModelError(f"model {self.name} has no tokenizer; read token texts from the task's vocabulary")
        return str(self.tokenizer.decode([token]))

    def _parameter(self, name: str) -> Tensor:
        """The values of a parameter, wherever they are."""
        return self.model.get_parameter(name)

    def _get(self, path: str) -> Any:
        return self.model.get_submodule(path)


def adapter_for(model: nn.Module) -> Adapter:
    """The adapter of a model's class.

    Raises:
        ModelError: unknown architecture; lists those that are supported.
    """
    name = type(model).__name__
    for adapter in all_adapters():
        if name in adapter.classes:
            return adapter
    raise ModelError(unsupported(name))


def unsupported(class_name: str) -> str:
    """The message for a class without adapter."""
    known = ", ".join(sorted(name for adapter in all_adapters() for name in adapter.classes))
    return (
        f"model: no adapter for architecture {class_name}; supported: {known}. "
        "To add one, write a file in hagd/models/architectures that names its sites"
    )
