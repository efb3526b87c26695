"""The models once more, wired by hand from their weights: no hooks, no autograd, nothing of `hagd.patching` or
`hagd.models.freezing`. Slow and obvious; what the fast code is compared with.

Shape legend: B sequences, T positions, H heads, d = d_model, L decomposed layers, S slots, m dictionary size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hagd.models.language_model import LanguageModel
from hagd.transcoders.records import Transcoder, TranscoderSet

Write = Callable[[int, Tensor, Tensor], Tensor]
"""(layer, what is read, what would be written) → what is written."""

WriteHeads = Callable[[int, Tensor], Tensor]
"""(layer, outputs of its heads `[B, T, H, e]`) → what is written instead."""


@dataclass
class Pass:
    """One forward pass: MLP inputs and outputs, residual stream after each layer (before it is patched), and the end.

    All by layer `[B, T, d]`, but `hidden` `[B, T, d]` and `logits` `[B, T, V]`. `heads`, by layer, are the outputs
    `[B, T, H, e]` that attention computed, where it is one of those below that tell.
    """

    mlp_in: list[Tensor]
    mlp_out: list[Tensor]
    resid: list[Tensor]
    hidden: Tensor
    logits: Tensor
    heads: dict[int, Tensor] = field(default_factory=dict)


def keep(layer: int, read: Tensor, written: Tensor) -> Tensor:
    return written


@torch.no_grad()
def run(
    lm: LanguageModel,
    tokens: Tensor,
    write: Write = keep,
    write_resid: Write = keep,
    attention: Any = None,
    norm: Any = None,
    nudge: Tensor | float = 0.0,
) -> Pass:
    """A forward pass; `attention` and `norm` replace the real modules, `nudge` is added to the token embedding."""
    attention = attention or Attention(lm)
    norm = norm or (lambda module, x: module(x))
    parallel = getattr(lm.model.config, "use_parallel_residual", False)
    x = embed(lm, tokens, nudge)
    found = Pass([], [], [], x, x)
    for i, layer in enumerate(lm.layers):
        a = attention(i, norm(layer.get_submodule(lm.adapter.attention_norm), x))
        read = norm(layer.get_submodule(lm.adapter.mlp_norm), x if parallel else x + a)
        out = write(i, read, lm.mlp(i)(read))
        found.mlp_in.append(read)
        found.mlp_out.append(out)
        found.resid.append(x + a + out)
        x = write_resid(i, found.resid[-1], found.resid[-1])
    found.hidden = norm(lm.model.get_submodule(lm.adapter.final_norm), x)
    found.logits = found.hidden @ lm.unembedding.weight.T
    found.heads = dict(getattr(attention, "heads", {}))
    return found


def embed(lm: LanguageModel, tokens: Tensor, nudge: Tensor | float = 0.0) -> Tensor:
    x = lm.embedding.weight[tokens]
    if lm.model.config.model_type == "gemma":
        x = x * lm.d_model**0.5
    x = x + nudge
    return x + lm.model.transformer.wpe.weight[: tokens.shape[1]] if lm.adapter.name == "gpt2" else x


class Attention:
    """The real attention of each layer, called by itself."""

    def __init__(self, lm: LanguageModel) -> None:
        self.lm = lm

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        n = x.shape[1]
        mask = torch.full((n, n), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)[None, None]
        options: dict[str, Any] = {}
        if self.lm.adapter.name != "gpt2":
            rotary = self.lm.model.get_submodule(self.lm.adapter.backbone).rotary_emb
            options["position_embeddings"] = rotary(x, torch.arange(n)[None])
        module = self.lm.layers[layer].get_submodule(self.lm.adapter.attention)
        return module(hidden_states=x, attention_mask=mask, **options)[0]


class HeadAttention(Attention):
    """The same with other outputs of heads."""

    def __init__(self, lm: LanguageModel, write: WriteHeads = lambda layer, z: z) -> None:
        super().__init__(lm)
        self.write = write
        self.heads: dict[int, Tensor] = {}

    def __call__(self, layer: int, x: Tensor) -> Tensor:
        def rewrite(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
            self.heads[layer] = inputs[0].unflatten(-1, (self.lm.model.config.num_attention_heads, -1))
            return (self.write(layer, self.heads[layer]).flatten(-2),)

        handle = output_projection(self.lm, layer).register_forward_pre_hook(rewrite)
        try:
            return super().__call__(layer, x)
        finally:
            handle.remove()


def output_projection(lm: LanguageModel, layer: int) -> nn.Module:
    block: Any = lm.layers[layer]
    if lm.adapter.name == "gpt2":
        return block.attn.c_proj
    return block.attention.dense if lm.adapter.name == "gpt_neox" else block.self_attn.o_proj


def heads_of(lm: LanguageModel, tokens: Tensor, layers: Sequence[int]) -> Tensor:
    """Outputs `[K, B, T, H, e]` of the heads of some layers of the unpatched model."""
    found = run(lm, tokens, attention=HeadAttention(lm)).heads
    return torch.stack([found[layer] for layer in layers])


class Frozen:
    """The linear model around one clean run: patterns, norm scales and MLP outputs are its constants.

    But for linear skips: what an MLP with one writes follows what it reads. The outputs of heads of `head_layers` are
    constants too.
    """

    def __init__(
        self,
        lm: LanguageModel,
        tokens: Tensor,
        transcoders: Sequence[Transcoder] = (),
        head_layers: Sequence[int] = (),
    ) -> None:
        self.lm, self.tokens = lm, tokens
        self.transcoders = {transcoder.layer: transcoder for transcoder in transcoders}
        with torch.no_grad():
            self.patterns = lm.model(input_ids=tokens, output_attentions=True, use_cache=False).attentions
        self.inputs: dict[nn.Module, Tensor] = {}
        self.clean = run(lm, tokens, norm=self._measure, attention=HeadAttention(lm))
        self.head_layers = head_layers
        self.moved_heads: dict[int, Tensor] = {}
        self.heads: dict[int, Tensor] = {}

    def _measure(self, module: nn.Module, x: Tensor) -> Tensor:
        self.inputs[module] = x
        return module(x)

    def __call__(
        self,
        moved: dict[int, Tensor] | None = None,
        nudge: Tensor | float = 0.0,
        moved_heads: dict[int, Tensor] | None = None,
    ) -> Pass:
        """The frozen pass when `moved[layer]` is added to what that MLP wrote, `nudge` to the embedding and
        `moved_heads[layer]` to what heads of `head_layers` wrote."""
        moved = moved or {}
        self.moved_heads = moved_heads or {}

        def write(layer: int, read: Tensor, written: Tensor) -> Tensor:
            out = self.clean.mlp_out[layer] + moved.get(layer, 0.0)
            if layer in self.transcoders:
                out = out + skipped(self.transcoders[layer], read - self.clean.mlp_in[layer])
            return out

        found = run(self.lm, self.tokens, write, attention=self._attend, norm=self._normalise, nudge=nudge)
        found.heads = dict(self.heads)
        return found

    def _attend(self, layer: int, x: Tensor) -> Tensor:
        pattern = self.patterns[layer]
        heads = pattern.shape[1]
        module = self.lm.layers[layer].get_submodule(self.lm.adapter.attention)
        b, t, d = x.shape
        if self.lm.adapter.name == "gpt2":
            value = (x @ module.c_attn.weight + module.c_attn.bias)[..., 2 * d :].reshape(b, t, heads, d // heads)
            project = module.c_proj
        elif self.lm.adapter.name == "gpt_neox":
            value = module.query_key_value(x).reshape(b, t, heads, 3, d // heads)[..., 2, :]
            project = module.dense
        else:
            own = module.v_proj(x).reshape(b, t, -1, module.head_dim)
            value = torch.stack([own[:, :, h * own.shape[2] // heads] for h in range(heads)], dim=2)
            project = module.o_proj
        mixed = torch.einsum("bhqk,bkhe->bqhe", pattern, value)
        self.heads[layer] = mixed
        if layer in self.head_layers:
            mixed = self.clean.heads[layer] + self.moved_heads.get(layer, 0.0)
        return project(mixed.reshape(b, t, -1))

    def _normalise(self, module: nn.Module, x: Tensor) -> Tensor:
        clean = self.inputs[module]
        if isinstance(module, nn.LayerNorm):
            deviation = clean.var(-1, keepdim=True, unbiased=False).add(module.eps).sqrt()
            return (x - x.mean(-1, keepdim=True)) / deviation * module.weight + module.bias
        eps = module.eps if hasattr(module, "eps") else module.variance_epsilon
        gain = 1 + module.weight if "Gemma" in type(module).__name__ else module.weight
        return x / clean.pow(2).mean(-1, keepdim=True).add(eps).sqrt() * gain


def encode(transcoder: Transcoder, x: Tensor) -> Tensor:
    """TopK of ReLU, or what exceeds the thresholds; token by token."""
    pre = x @ transcoder.W_enc.T + transcoder.b_enc
    f = torch.zeros_like(pre)
    for place in torch.cartesian_prod(*(torch.arange(n) for n in pre.shape[:-1])).reshape(-1, pre.dim() - 1).tolist():
        row = pre[tuple(place)].tolist()
        kept = range(len(row))
        if transcoder.k is not None:
            kept = sorted(kept, key=lambda j: -row[j])[: transcoder.k]
        for j in kept:
            if row[j] > (0.0 if transcoder.threshold is None else transcoder.threshold[j]):
                f[(*place, j)] = row[j]
    return f


def decoder(transcoders: TranscoderSet, source: int, target: int) -> Tensor | None:
    """Through which the features at place `source` write to the layer at place `target`, if they do."""
    decoders = (transcoders.transcoders[source].W_dec, *transcoders.transcoders[source].W_later)
    return decoders[target - source] if 0 <= target - source < len(decoders) else None


def written_features(transcoders: TranscoderSet, target: int, features: Sequence[Tensor]) -> Tensor:
    """What features `[…, m]` of the layers up to place `target` write there, one after the other."""
    total: Tensor | float = 0.0
    for source, f in enumerate(features[: target + 1]):
        rows = decoder(transcoders, source, target)
        for j in range(transcoders.m if rows is not None else 0):
            assert rows is not None
            total = total + f[..., j, None] * rows[j]
    assert isinstance(total, Tensor)
    return total


def skipped(transcoder: Transcoder, x: Tensor) -> Tensor | float:
    return 0.0 if transcoder.W_skip is None else x @ transcoder.W_skip


def site_values(lm: LanguageModel, transcoders: TranscoderSet, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What each decomposed site reads and writes in the unpatched model."""
    found = run(lm, tokens)
    if transcoders.site == "resid":
        return [(found.resid[layer], found.resid[layer]) for layer in transcoders.layers]
    return [(found.mlp_in[layer], found.mlp_out[layer]) for layer in transcoders.layers]


def features_of(lm: LanguageModel, transcoders: TranscoderSet, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Features `[L, B, T, m]` and errors `[L, B, T, d]` of the unpatched model."""
    values = site_values(lm, transcoders, tokens)
    f = torch.stack([encode(t, x) for t, (x, _) in zip(transcoders.transcoders, values, strict=True)])
    errors = [
        y - (written_features(transcoders, i, list(f)) + skipped(t, x) + t.b_dec)
        for i, (t, (x, y)) in enumerate(zip(transcoders.transcoders, values, strict=True))
    ]
    return f, torch.stack(errors)


def mean_by_slot(values: Tensor, slots: Tensor, n_slots: int) -> Tensor:
    """Mean of `values` `[L, B, T, …]` over the positions of each slot, `[L, S, …]`; 0 where there are none."""
    out = torch.zeros(values.shape[0], n_slots, values.shape[-1], dtype=values.dtype)
    for s in range(n_slots):
        if (slots == s).any():
            out[:, s] = values[:, slots == s].mean(1)
    return out
