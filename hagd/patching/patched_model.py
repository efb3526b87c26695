"""The patched model M_C: features outside a circuit are held at their ablation value.

At every decomposed site `a ← Σ_i (g_i f_i + (1 − g_i) v_i) d_i + b + ε̃`, where `f_i` is recomputed on the
patched run and `g_i` is 1 inside the circuit, 0 outside, in between for gates and path integrals. The real
attention, norms, embeddings and, where dictionaries have them, linear skips run. Features of a cross-layer
transcoder are patched once and written to every layer that they write to.

Where heads are nodes, each of their layers' heads gives `z̃_h = v_h + g_h (z_h − v_h)` to the output projection, with
`z_h` recomputed on the patched run like features; all other attention runs free.

Shape legend: N prompts, C options, B = N·C sequences, T positions, A scored positions, V vocabulary, G gate
settings, L decomposed layers, S slots, m dictionary size, d = d_model; K layers whose heads are nodes, H heads, e
width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hagd.activations.capture import capture, site_module
from hagd.activations.heads import head_outputs, rewritten_heads
from hagd.config.stages import Ablation, ErrorMode
from hagd.models.language_model import LanguageModel
from hagd.models.linear_parts import linear_attention
from hagd.patching.prefix import Prefix
from hagd.patching.records import GateLayout, HeadMeans, SlotMeans
from hagd.patching.replaced_forward import forward_as
from hagd.tasks.records import Prompts
from hagd.transcoders.records import Transcoder, TranscoderSet


@dataclass(frozen=True)
class _Run:
    """One batch of sequences and how its sites are patched."""

    slots: Tensor  # [B, T]
    gates: Tensor  # [G, L, S, m]
    owner: Tensor  # [B], which gate setting applies
    ablated: Tensor | None  # [L, B, T, m] values of this batch; None = means, or zero
    errors: Tensor | None  # [L, B, T, d] errors of this batch; None = means
    head_gates: Tensor | None  # [G, K, S, H]; None = no heads
    heads: Tensor | None  # [K, B, T, H, e] ablation values of this batch
    deviations: Tensor | None = None  # [L, B, T, m] what a gate scales, when not the running feature's own deviation
    head_deviations: Tensor | None = None  # [K, B, T, H, e] the same of heads
    written: Tensor | None = None  # [L, B, T, m] what open features write, whatever they read
    read: list[Tensor] | None = None  # collects what features read, [B, T, m] by layer


class PatchedModel:
    """A language model whose decomposed sites can be patched.

    Attributes:
        evaluations: prompts run forward through the patched model since construction; a backward pass
            counts as two further forward passes. The unit of every search budget, divided by the number of
            prompts of a split.
    """

    def __init__(
        self, lm: LanguageModel, transcoders: TranscoderSet, means: SlotMeans, head_means: HeadMeans | None = None
    ) -> None:
        self.lm = lm
        self.transcoders = transcoders
        self.means = means
        self.head_means = head_means
        self.evaluations = 0
        _, n_slots, m = means.features.shape
        layers, heads = transcoders.layers, (head_means.layers, head_means.outputs.shape[2]) if head_means else ((), 0)
        self.layout = GateLayout(layers, n_slots, m, *heads)
        self._prefix = Prefix(lm, min(layers + self.layout.head_layers))

    @property
    def gate_shape(self) -> tuple[int, ...]:
        """(L, S, m), or a single axis where heads are nodes (`GateLayout`)."""
        return self.layout.shape

    @property
    def frequency(self) -> Tensor:
        """Share of the discovery prompts on which each node is active, in the shape of the gates; 1 for heads."""
        heads = torch.ones(len(self.layout.head_layers), self.layout.n_slots, self.layout.n_heads)
        return self.layout.join(self.means.frequency, heads.to(self.means.frequency.device))

    @property
    def mean_activation(self) -> Tensor:
        """Mean of each node over the discovery split, in the shape of the gates; of a head, its mean write's length."""
        return self.layout.join(self.means.features, self.mean_head_writes().norm(dim=-1))

    def mean_head_writes(self) -> Tensor:
        """What heads add to the residual stream on average, `[K, S, H, d]`."""
        found = self.means.errors.new_zeros(0, self.layout.n_slots, self.layout.n_heads, self.lm.d_model)
        if self.head_means is None:
            return found
        outputs = self.head_means.outputs
        parts = [linear_attention(self.lm, layer, outputs.dtype) for layer in self.head_means.layers]
        written = [torch.einsum("she,hed->shd", z, part.W_O) for z, part in zip(outputs, parts, strict=True)]
        return torch.stack(written)

    def logits(
        self,
        prompts: Prompts,
        gates: Tensor,
        *,
        ablation: Ablation = "mean",
        error: ErrorMode = "mean",
        owner: Tensor | None = None,
    ) -> Tensor:
        """Logits `[N, C, A, V]` at the scored positions.

        Args:
            prompts: N prompts.
            gates: `[*gate_shape]`, or `[G, *gate_shape]` with `owner`.
            ablation: value of a node whose gate is 0.
            error: error term at its mean, or kept from the clean run.
            owner: int64 `[N]`, the gate setting of each prompt.
        """
        n, c = prompts.tokens.shape[:2]
        flat = prompts.flat()
        gates = (gates if gates.dim() > len(self.layout.shape) else gates[None]).to(flat.tokens.device)
        owner = torch.zeros(n, dtype=torch.long) if owner is None else owner
        run = self._run(flat, gates, owner.repeat_interleave(c), ablation, error)
        self.evaluations += n * (3 if gates.requires_grad else 1)
        with self._prefix.resumed(flat.tokens), self._patched(run, zero=ablation == "zero"):
            logits = self.lm.logits_at(flat.tokens, flat.scored)
        return logits.unflatten(0, (n, c))

    @torch.no_grad()
    def reading(
        self,
        prompts: Prompts,
        gates: Tensor,
        written: Tensor | None,
        *,
        ablation: Ablation,
        error: ErrorMode,
        owner: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Logits `[N, C, A, V]` and what features read `[L, B, T, m]` in a run in which they write `written`.

        A feature's own value is then not what others see of it, so that each edge can be patched: in the run of one
        reader, closed gates cut the edges into it and leave those into others.

        Args:
            prompts: N prompts.
            gates: `[G, *gate_shape]`; a closed feature writes its ablation value.
            written: `[L, B, T, m]`; None: what features read in this run.
            ablation: value of a node whose gate is 0.
            error: error term at its mean, or kept from the clean run.
            owner: int64 `[N]`, the gate setting of each prompt.
        """
        n, c = prompts.tokens.shape[:2]
        flat = prompts.flat()
        owner = torch.zeros(n, dtype=torch.long) if owner is None else owner
        run = self._run(flat, gates.to(flat.tokens.device), owner.repeat_interleave(c), ablation, error)
        read: list[Tensor] = []
        run = replace(run, written=written, read=read)
        self.evaluations += n
        with self._prefix.resumed(flat.tokens), self._patched(run, zero=ablation == "zero"):
            logits = self.lm.logits_at(flat.tokens, flat.scored)
        return logits.unflatten(0, (n, c)), torch.stack(read)

    def logits_between(
        self, prompts: Prompts, gates: Tensor, share: float, *, ablation: Ablation, error: ErrorMode
    ) -> Tensor:
        """Logits `[N, C, A, V]` with token embeddings at `share` of the way from the counterfactual to the prompt.

        A gate g adds (g − 1) times the node's deviation on the prompt itself, so the gradient at g = 1 is that of the
        node on the mixed input times its deviation from the ablation value on the clean one.

        Args:
            prompts: N prompts.
            gates: `[*gate_shape]`.
            share: 1 is the prompt, 0 the counterfactual.
            ablation: value of a node whose gate is 0.
            error: error term at its mean, or kept from the clean run.
        """
        n, c = prompts.tokens.shape[:2]
        flat = prompts.flat()
        owner = torch.zeros(n * c, dtype=torch.long)
        run = self._run(flat, gates[None].to(flat.tokens.device), owner, ablation, error)
        clean = self.features(flat.tokens)[0]
        ablated = self.means.features[:, flat.slots.clamp(min=0)] if run.ablated is None else run.ablated
        run = replace(
            run,
            deviations=clean if ablation == "zero" else clean - ablated,
            head_deviations=None if run.heads is None else self.heads(flat.tokens) - run.heads,
        )
        self.evaluations += n * (3 if gates.requires_grad else 1)
        start = self.lm.embedding(flat.counterfactual)

        def mix(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            return torch.lerp(start, output, share)

        with ExitStack() as stack:
            stack.callback(self.lm.embedding.register_forward_hook(mix).remove)
            stack.enter_context(self._patched(run, zero=ablation == "zero"))
            logits = self.lm.logits_at(flat.tokens, flat.scored)
        return logits.unflatten(0, (n, c))

    def full_logits(self, prompts: Prompts) -> Tensor:
        """Logits `[N, C, A, V]` of the unpatched model."""
        flat = prompts.flat()
        with self._prefix.resumed(flat.tokens):
            logits = self.lm.logits_at(flat.tokens, flat.scored)
        return logits.unflatten(0, prompts.tokens.shape[:2])

    def _run(self, flat: Prompts, gates: Tensor, owner: Tensor, ablation: Ablation, error: ErrorMode) -> _Run:
        """Sequences `[B, T]` under gates `[G, *gate_shape]`, of which `owner` `[B]` tells each one's."""
        return _Run(
            slots=flat.slots,
            gates=self.layout.features(gates),
            owner=owner.to(gates.device),
            ablated=self._ablation_values(flat, ablation),
            errors=self._clean_errors(flat) if error == "keep" else None,
            head_gates=self.layout.heads(gates) if self.head_means is not None else None,
            heads=self.ablated_heads(flat.counterfactual, flat.slots, ablation),
        )

    def features(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Clean features `[L, B, T, m]` and errors `[L, B, T, d]` of sequences `[B, T]`."""
        with self._prefix.resumed(tokens):
            x, y = capture(self.lm, tokens, self.transcoders.site, self.transcoders.layers)
        f = torch.stack([t.encode(xl) for t, xl in zip(self.transcoders.transcoders, x, strict=True)])
        errors = [
            yl - self.transcoders.reconstruct(i, list(f), xl) for i, (xl, yl) in enumerate(zip(x, y, strict=True))
        ]
        return f, torch.stack(errors)

    def heads(self, tokens: Tensor) -> Tensor:
        """Clean outputs `[K, B, T, H, e]` of the heads that are nodes, for sequences `[B, T]`."""
        with self._prefix.resumed(tokens):
            return head_outputs(self.lm, tokens, self.layout.head_layers)

    def ablated_heads(self, counterfactual: Tensor, slots: Tensor, ablation: Ablation) -> Tensor | None:
        """Ablation values `[K, B, T, H, e]` of heads, for counterfactuals and slots `[B, T]`; None without heads."""
        if self.head_means is None:
            return None
        if ablation == "resample":
            return self.heads(counterfactual)
        means = self.head_means.outputs[:, slots.clamp(min=0)]
        return torch.zeros_like(means) if ablation == "zero" else means

    def _ablation_values(self, flat: Prompts, ablation: Ablation) -> Tensor | None:
        return self.features(flat.counterfactual)[0] if ablation == "resample" else None

    def _clean_errors(self, flat: Prompts) -> Tensor:
        return self.features(flat.tokens)[1]

    @contextmanager
    def _patched(self, run: _Run, zero: bool) -> Iterator[None]:
        features: list[Tensor] = []
        with ExitStack() as stack:
            for index, transcoder in enumerate(self.transcoders.transcoders):
                output = self._output(index, transcoder, run, zero, features)
                module = site_module(self.lm, self.transcoders.site, transcoder.layer)
                if self.transcoders.site == "mlp":  # nothing reads what the MLP itself would give
                    stack.enter_context(forward_as(module, output))
                else:
                    stack.callback(module.register_forward_hook(_after(output)).remove)
            stack.enter_context(rewritten_heads(self.lm, self.layout.head_layers, _head_patch(run)))
            yield

    def _output(
        self, index: int, transcoder: Transcoder, run: _Run, zero: bool, features: list[Tensor]
    ) -> Callable[[Tensor], Tensor]:
        """What the site gives, `[B, T, d]`, for the dictionary's input.

        `features` collects the patched features of one forward pass, layer after layer.
        """
        slots = run.slots.clamp(min=0)
        gate = run.gates[:, index][run.owner[:, None], slots]  # [B, T, m]
        ablated = run.ablated[index] if run.ablated is not None else self.means.features[index][slots]
        error = run.errors[index] if run.errors is not None else self.means.errors[index][slots]

        def output(entering: Tensor) -> Tensor:
            x = entering.to(gate.device)
            f = transcoder.encode(x)
            if run.read is not None:
                run.read.append(f)
            if run.written is not None:
                f = run.written[index]
            if run.deviations is not None:
                f = f + (gate - 1) * run.deviations[index]
            else:
                f = gate * f if zero else ablated + gate * (f - ablated)
            features[index:] = [f]
            return (self.transcoders.reconstruct(index, features, x) + error).to(entering.device, x.dtype)

        return output


def _after(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """A forward hook that changes what a layer gives."""

    def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    return hook


def _head_patch(run: _Run) -> Callable[[int, Tensor], Tensor]:
    """What replaces the outputs `[B, T, H, e]` of the heads of a layer."""

    def patch(index: int, z: Tensor) -> Tensor:
        assert run.head_gates is not None and run.heads is not None
        gate = run.head_gates[:, index][run.owner[:, None], run.slots.clamp(min=0)]  # [B, T, H]
        wide = torch.promote_types(z.dtype, torch.float32)
        if run.head_deviations is not None:
            return z.to(wide) + (gate[..., None] - 1).to(wide) * run.head_deviations[index].to(wide)
        # lerp is exact at both ends: an open gate gives z itself.
        return torch.lerp(run.heads[index].to(wide), z.to(wide), gate[..., None].to(wide))

    return patch
