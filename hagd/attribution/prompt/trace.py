"""One clean run of one prompt: everything that the frozen linear model around it takes as a constant.

Shape legend: T positions, n active features, d = d_model, H heads, e width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hagd.errors import NumericalError
from hagd.models.freezing import frozen_linear
from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import linear_attention_shape
from hagd.transcoders.records import Transcoder, TranscoderSet

_ENCODED_AT_ONCE = 256
"""Positions whose whole dictionary is held at a time."""


@dataclass(frozen=True)
class ActiveFeatures:
    """Features that are not zero, by layer, position, feature; parallel vectors `[n]`.

    Attributes:
        layer: model layer.
        position, feature: where and which.
        activation: value of the feature.
    """

    layer: Tensor
    position: Tensor
    feature: Tensor
    activation: Tensor

    def __len__(self) -> int:
        return len(self.layer)


@dataclass(frozen=True)
class Trace:
    """The clean run.

    Attributes:
        tokens: int64 `[T]`.
        entering: `[T, d]`, residual stream before layer 0. embedding: `[T, d]`, the tokens' part of it.
        patterns: layer → `[H, T, T]`, rows are queries.
        attention_read, mlp_read: layer → `[T, d]`, what enters the norm before attention and MLP.
        final_read: `[T, d]`, what enters the last norm.
        final: `[T, d]`, what the unembedding reads.
        mlp_in, mlp_out: layer → `[T, d]`, what the MLP reads after its norm and what it writes.
        heads: layer → `[T, H, e]`, outputs z of the heads of the layers whose heads are nodes.
        logits: `[V]` at the last position.
    """

    tokens: Tensor
    entering: Tensor
    embedding: Tensor
    patterns: tuple[Tensor, ...]
    attention_read: tuple[Tensor, ...]
    mlp_read: tuple[Tensor, ...]
    final_read: Tensor
    final: Tensor
    mlp_in: tuple[Tensor, ...]
    mlp_out: tuple[Tensor, ...]
    heads: dict[int, Tensor]
    logits: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Double for models in double precision, else single."""
        return self.entering.dtype


@torch.no_grad()
def trace(lm: LanguageModel, tokens: Tensor, head_layers: Sequence[int] = ()) -> Trace:
    """Run `tokens` `[T]` once; the heads of `head_layers` are nodes.

    Raises:
        NumericalError: an activation is NaN or infinite; names the layer.
    """
    seen, hidden, logits = _watched(lm, tokens, head_layers)
    every = range(lm.n_layers)
    for i in every:
        if not seen["mlp_out", i].isfinite().all():
            raise NumericalError(
                f"activations of {lm.name}, layer {i}: expected finite values, found NaN or infinity; check "
                "model.dtype (float16 overflows) and the weights"
            )
    n_heads, _, _ = linear_attention_shape(lm)
    entering = seen["attention_read", 0]
    embedding = entering - seen["positions", 0] if ("positions", 0) in seen else entering

    def by_layer(name: str) -> tuple[Tensor, ...]:
        return tuple(seen[name, i] for i in every)

    return Trace(
        tokens=tokens,
        entering=entering,
        embedding=embedding,
        patterns=by_layer("pattern"),
        attention_read=by_layer("attention_read"),
        mlp_read=by_layer("mlp_read"),
        final_read=seen["final_read", 0],
        final=hidden,
        mlp_in=by_layer("mlp_in"),
        mlp_out=by_layer("mlp_out"),
        heads={i: seen["heads", i].unflatten(-1, (n_heads, -1)) for i in head_layers},
        logits=logits,
    )


def _watched(
    lm: LanguageModel, tokens: Tensor, head_layers: Sequence[int]
) -> tuple[dict[tuple[str, int], Tensor], Tensor, Tensor]:
    """What modules read and wrote, by name and layer, what the unembedding read `[T, d]`, and its last logits `[V]`."""
    dtype = torch.promote_types(lm.model.dtype, torch.float32)
    seen: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, layer: int, value: Tensor) -> None:
        seen[name, layer] = value[0].to(tokens.device, dtype)

    with ExitStack() as stack:
        stack.enter_context(frozen_linear(lm))  # its attention hands its pattern on

        def hook(module: nn.Module, call: Any) -> None:
            stack.callback(module.register_forward_hook(call).remove)

        def reads(name: str, layer: int) -> Any:
            return lambda _, inputs, output: keep(name, layer, inputs[0])

        hook(lm.model.get_submodule(lm.adapter.final_norm), reads("final_read", 0))
        if lm.adapter.positions is not None:
            hook(lm.model.get_submodule(lm.adapter.positions), lambda _, i, output: keep("positions", 0, output))
        for i, layer in enumerate(lm.layers):
            hook(layer.get_submodule(lm.adapter.attention_norm), reads("attention_read", i))
            hook(layer.get_submodule(lm.adapter.mlp_norm), reads("mlp_read", i))
            hook(lm.mlp(i), reads("mlp_in", i))
            hook(lm.mlp(i), lambda _, inputs, output, i=i: keep("mlp_out", i, output))
            attention = layer.get_submodule(lm.adapter.attention)
            hook(attention, lambda _, inputs, output, i=i: keep("pattern", i, output[1]))
            if i in head_layers:
                hook(lm.attention_output(i), reads("heads", i))
        hidden = lm.hidden(tokens[None])
        logits = lm.unembedding(hidden[:, -1])[0].to(tokens.device, dtype)
    return seen, hidden[0].to(tokens.device, dtype), logits


@torch.no_grad()
def decompose(
    run: Trace, transcoders: TranscoderSet, *, skip_first: bool = False
) -> tuple[ActiveFeatures, tuple[Tensor, ...]]:
    """What each MLP wrote, as active features and errors.

    Args:
        run: the clean run.
        transcoders: of the MLPs.
        skip_first: no features at the first position, whose massive activations in language models no dictionary fits.

    Returns:
        The active features, and by model layer what features, decoder bias and linear skip leave over, `[T, d]`: of a
        layer without dictionary all that its MLP wrote.
    """
    found: list[ActiveFeatures] = []
    errors = list(run.mlp_out)
    for index, transcoder in enumerate(transcoders.transcoders):
        layer = transcoder.layer
        active = _encode(transcoder, run.mlp_in[layer], int(skip_first))
        found.append(active)
        x = run.mlp_in[layer].to(transcoder.W_dec.dtype)
        written = transcoder.b_dec + transcoder.skip(x)
        for source in range(index + 1):
            first = transcoders.transcoders[source]
            decoders = (first.W_dec, *first.W_later)
            if index - source < len(decoders):
                rows = decoders[index - source][found[source].feature] * found[source].activation[:, None]
                written = written.index_add(0, found[source].position, rows.to(written.dtype))
        errors[layer] = run.mlp_out[layer] - written.to(run.dtype)
    return (
        ActiveFeatures(
            *(torch.cat([getattr(f, name) for f in found]) for name in ("layer", "position", "feature", "activation"))
        ),
        tuple(errors),
    )


def _encode(transcoder: Transcoder, x: Tensor, first: int) -> ActiveFeatures:
    """Active features at positions from `first` on."""
    parts = []
    for start in range(first, len(x), _ENCODED_AT_ONCE):
        f = transcoder.encode(x[start : start + _ENCODED_AT_ONCE])
        position, feature = f.nonzero(as_tuple=True)
        parts.append((position + start, feature, f[position, feature]))
    position, feature, activation = (torch.cat(column) for column in zip(*parts, strict=True))
    return ActiveFeatures(torch.full_like(position, transcoder.layer), position, feature, activation)
