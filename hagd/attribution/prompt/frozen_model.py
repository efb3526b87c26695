"""The frozen linear model of one prompt, by its own matrices: pulls gradients down, pushes contributions up.

With attention patterns and norm scales held at their clean values and every MLP replaced by its features, error and
linear skip, the residual stream is linear in what is written to it. The projections of queries and keys, the MLPs and
the parts of the model above a target do not occur. Where the heads of a layer are nodes, their outputs are written like
those of an MLP, and nothing passes through that attention. Gains and centring of norms are folded into the projections,
their scales into the patterns, so that a layer costs the products with V, O and the pattern alone.

Shape legend: T positions, P positions up to the last target of a batch, R rows (targets), d = d_model, H heads,
K heads of keys and values, e width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from hagd.attribution.prompt.trace import Trace
from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import LinearAttention, LinearNorm, linear_attention, linear_norm
from hagd.transcoders.records import TranscoderSet


@dataclass(frozen=True)
class FrozenLayer:
    """One layer; `frozen_layer` makes it.

    Attributes:
        pattern: `[H, T, T]`, times the scale of the norm at the key.
        values: `[H, e, d]`, from a head's values back to the residual stream; heads that share keys repeat theirs.
        outputs: `[d, H·e]`, from the residual stream back to the heads.
        attention, attention_norm, mlp_norm: for pushing, and for starting at an MLP's input.
        attention_scale, mlp_scale: `[T]`.
        skip: `[d, d]` or None, the linear path of the layer's transcoder.
    """

    pattern: Tensor
    values: Tensor
    outputs: Tensor
    attention: LinearAttention
    attention_norm: LinearNorm
    mlp_norm: LinearNorm
    attention_scale: Tensor
    mlp_scale: Tensor
    skip: Tensor | None


@dataclass(frozen=True)
class Pushed:
    """A pass upwards: what each attention and each MLP reads, by layer `[T, d]`, and what the unembedding reads."""

    attention_in: tuple[Tensor, ...]
    mlp_in: tuple[Tensor, ...]
    final: Tensor


Reader = Literal["mlp", "attention", "heads"]
"""An MLP, or queries and keys of an attention, or values that a head mixes."""

Writer = Literal["embedding", "mlp", "heads"]

Visit = Callable[[Writer, int, Tensor], None]
"""Called from the top down with what writes, its layer (−1: the embedding) and the gradients at what it wrote: `[R, d]`
where each row has one at its own position only, else `[P, R, d]`."""


class FrozenModel:
    """The frozen linear model around a clean run; `freeze` makes it of a language model.

    Args:
        layers: from the first to the last.
        final_norm: before the unembedding. final_scale: `[T]`, its scales.
        parallel: attention and MLP of a layer read the same.
        head_layers: whose heads are nodes.
    """

    def __init__(
        self,
        layers: Sequence[FrozenLayer],
        final_norm: LinearNorm,
        final_scale: Tensor,
        parallel: bool,
        head_layers: Collection[int] = (),
    ) -> None:
        self._layers = layers
        self.final_norm = final_norm
        self.final_scale = final_scale
        self.parallel = parallel
        self.head_layers = frozenset(head_layers)

    @property
    def n_layers(self) -> int:
        """Transformer blocks."""
        return len(self._layers)

    def at_mlp_input(self, layer: int, positions: Tensor, vectors: Tensor) -> Tensor:
        """Gradients `[R, d]` before the norm, for `vectors` `[R, d]` at what the MLP reads."""
        where = self._layers[layer]
        return where.mlp_norm.transposed(vectors) * where.mlp_scale[positions, None]

    def at_unembedding(self, positions: Tensor, vectors: Tensor) -> Tensor:
        """Gradients `[R, d]` before the last norm, for `vectors` `[R, d]` after it."""
        return self.final_norm.transposed(vectors) * self.final_scale[positions, None]

    def at_attention_input(self, layer: int, positions: Tensor, vectors: Tensor) -> Tensor:
        """Gradients `[R, d]` before the norm, for `vectors` `[R, d]` at what the attention reads."""
        where = self._layers[layer]
        return where.attention_norm.transposed(vectors) * where.attention_scale[positions, None]

    def at_heads(self, layer: int, positions: Tensor, heads: Tensor, vectors: Tensor) -> Tensor:
        """Gradients `[P, R, d]` before the norm, for `vectors` `[R, d]` from `head_reads` and the heads `[R]`."""
        n = int(positions[-1]) + 1
        return self._layers[layer].pattern[heads, positions, :n].T.contiguous()[..., None] * vectors

    def head_reads(self, layer: int, directions: Tensor) -> Tensor:
        """What heads read along, `[T, H, d]`, for `directions` `[T, H, e]` at outputs; without pattern and scale."""
        return torch.einsum("the,hed->thd", directions, self._layers[layer].values)

    def head_writes(self, layer: int, outputs: Tensor) -> Tensor:
        """What heads add to the residual stream, `[T, H, d]`, for their `outputs` `[T, H, e]`."""
        return torch.einsum("the,hed->thd", outputs, self._layers[layer].attention.W_O)

    def head_outputs(self, layer: int, read: Tensor) -> Tensor:
        """The outputs `[T, H, e]` of heads for what the attention reads, `[T, d]`."""
        return _mix(self._layers[layer], read, True).transpose(0, 1)

    def heads_end(self, layer: int, reads: Reader) -> int:
        """Layer below which heads can be sources of what reads at `layer`."""
        return layer + int(reads == "mlp" and not self.parallel)

    def pull(self, layer: int, positions: Tensor, gradient: Tensor, visit: Visit, reads: Reader = "mlp") -> None:
        """Carry the gradients of R targets that read at one layer down to everything that is written below them.

        Args:
            layer: the layer whose MLP reads, or the number of layers for targets after the last one.
            positions: `[R]`, ascending, where each target reads.
            gradient: `[R, d]` before the norm of what reads, at its position; of heads `[P, R, d]`.
            visit: gets the gradients at each place that is written to.
            reads: what reads in that layer.
        """
        # where this holds, the MLP reads after the attention of its layer
        own = layer < self.n_layers and reads == "mlp" and not self.parallel
        g = gradient
        for i in range(layer if own else layer - 1, -1, -1):
            where, at, skipped = self._layers[i], positions if g.dim() == 2 else None, None
            if not (own and i == layer):
                visit("mlp", i, g)
                skipped = _skipped(where, g, at)
            if skipped is not None and not self.parallel:
                g, skipped = g + skipped, None
            if i in self.head_layers:
                visit("heads", i, g)
                g = g if skipped is None else g + skipped
                continue
            g = self._from_point(where, positions, g) if at is not None else self._attention(where, g)
            if skipped is not None:
                _add(g, skipped, at)
        visit("embedding", -1, g)

    def _from_point(self, where: FrozenLayer, positions: Tensor, g: Tensor) -> Tensor:
        """`[P, R, d]` below an attention above which each row has a gradient `g` `[R, d]` at its own position only."""
        heads, e, d = where.values.shape
        n = int(positions[-1]) + 1
        back = torch.bmm((g @ where.outputs).view(-1, heads, e).transpose(0, 1), where.values)  # [H, R, d]
        out = g.new_empty(n, len(g), d)
        bounds = [0, *(torch.diff(positions).nonzero()[:, 0] + 1).tolist(), len(g)]
        for first, last in pairwise(bounds):
            p = int(positions[first])
            mixed = where.pattern[:, p, :n].T @ back[:, first:last].reshape(heads, -1)
            out[:, first:last] = mixed.view(n, last - first, d)
        _add(out, g, positions)
        return out

    def _attention(self, where: FrozenLayer, g: Tensor) -> Tensor:
        """`[P, R, d]` below an attention, for gradients of that shape above it."""
        heads, e, d = where.values.shape
        n, rows, _ = g.shape
        back = (g.view(-1, d) @ where.outputs).view(n, rows, heads, e).permute(2, 0, 1, 3).reshape(heads, n, -1)
        mixed = torch.bmm(where.pattern[:, :n, :n].transpose(1, 2), back)
        mixed = mixed.view(heads, n, rows, e).permute(1, 2, 0, 3).reshape(n * rows, heads * e)
        return torch.addmm(g.view(-1, d), mixed, where.values.view(heads * e, d)).view(n, rows, d)

    def push(self, entering: Tensor, written: tuple[Tensor, ...], biases: bool = True) -> Pushed:
        """Carry what is written up to everything that reads; heads that are nodes write nothing.

        Args:
            entering: `[T, d]`, residual stream before layer 0.
            written: layer → `[T, d]`, what each MLP writes, its linear skip apart.
            biases: whether those of attention and norms count too.
        """
        x, attention_in, mlp_in = entering, [], []
        for i, (where, own) in enumerate(zip(self._layers, written, strict=True)):
            heard = where.attention_norm.apply(x, where.attention_scale)
            heard = heard + where.attention_norm.bias if biases else heard
            attention_in.append(heard)
            if i in self.head_layers:
                after = x + where.attention.b_O if biases else x
            else:
                after = x + _attend(where, heard, biases)
            read = where.mlp_norm.apply(x if self.parallel else after, where.mlp_scale)
            read = read + where.mlp_norm.bias if biases else read
            mlp_in.append(read)
            x = after + own
            if where.skip is not None:
                x = x + read @ where.skip
        final = self.final_norm.apply(x, self.final_scale)
        return Pushed(tuple(attention_in), tuple(mlp_in), final + self.final_norm.bias if biases else final)


def freeze(lm: LanguageModel, run: Trace, transcoders: TranscoderSet) -> FrozenModel:
    """The frozen linear model of `lm` around a clean run."""
    skips = {t.layer: t.W_skip for t in transcoders.transcoders if t.W_skip is not None}

    def norm(block: nn.Module, path: str) -> LinearNorm:
        found = linear_norm(block.get_submodule(path), run.dtype)
        return replace(found, gain=found.gain.to(lm.device), bias=found.bias.to(lm.device))

    layers = [
        frozen_layer(
            linear_attention(lm, i, run.dtype),
            run.patterns[i],
            (norm(block, lm.adapter.attention_norm), run.attention_read[i]),
            (norm(block, lm.adapter.mlp_norm), run.mlp_read[i]),
            skips.get(i),
        )
        for i, block in enumerate(lm.layers)
    ]
    final = norm(lm.model, lm.adapter.final_norm)
    return FrozenModel(layers, final, final.scale(run.final_read), lm.parallel, run.heads)


def frozen_layer(
    attention: LinearAttention,
    pattern: Tensor,
    attention_norm: tuple[LinearNorm, Tensor],
    mlp_norm: tuple[LinearNorm, Tensor],
    skip: Tensor | None = None,
) -> FrozenLayer:
    """A layer from its projections, its pattern `[H, T, T]`, its norms with what enters them `[T, d]`, and a skip."""
    heads, _, d = attention.W_O.shape
    back = attention_norm[0].transposed(attention.W_V.transpose(1, 2))
    scale = attention_norm[0].scale(attention_norm[1])
    return FrozenLayer(
        pattern=pattern * scale,
        values=back.repeat_interleave(heads // len(back), dim=0),
        outputs=attention.W_O.reshape(-1, d).T.contiguous(),
        attention=attention,
        attention_norm=attention_norm[0],
        mlp_norm=mlp_norm[0],
        attention_scale=scale,
        mlp_scale=mlp_norm[0].scale(mlp_norm[1]),
        skip=None if skip is None else skip.to(pattern.dtype),
    )


def _attend(where: FrozenLayer, read: Tensor, biases: bool) -> Tensor:
    """What attention adds when it reads `[T, d]`."""
    out = torch.einsum("hte,hed->td", _mix(where, read, biases), where.attention.W_O)
    return out + where.attention.b_O if biases else out


def _mix(where: FrozenLayer, read: Tensor, biases: bool) -> Tensor:
    """Outputs `[H, T, e]` of the heads; the unscaled pattern is the folded one over the scale."""
    own = where.attention
    groups = len(own.W_O) // len(own.W_V)
    values = torch.einsum("td,kde->kte", read, own.W_V)
    values = values + own.b_V[:, None] if biases else values
    return (where.pattern / where.attention_scale) @ values.repeat_interleave(groups, dim=0)


def _skipped(where: FrozenLayer, g: Tensor, positions: Tensor | None) -> Tensor | None:
    """The gradient that a linear skip carries from what its MLP writes to what it reads."""
    if where.skip is None:
        return None
    back = where.mlp_norm.transposed(g @ where.skip.T)
    if positions is not None:
        return back * where.mlp_scale[positions, None]
    return back * where.mlp_scale[: len(g), None, None]


def _add(spread: Tensor, g: Tensor, positions: Tensor | None) -> None:
    """Add `g` to `spread` `[P, R, d]`: `[P, R, d]`, or `[R, d]` at each row's own position."""
    if positions is None:
        spread += g
    else:
        spread[positions, torch.arange(len(g), device=g.device)] += g
