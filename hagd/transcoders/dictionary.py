"""One layer's dictionary while it is trained, in scaled units.

Shape legend: B tokens, n active pairs, d = d_model, m dictionary size, T layers written to (1, or every later one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.activation_functions import JumpReLU, Step
from hagd.transcoders.sparse.chunks import linear
from hagd.transcoders.sparse.device_kernels import large, large_on_cpu
from hagd.transcoders.sparse.products import decode, decode_and_lengths, gather_dot, row_norms, squared_error
from hagd.transcoders.sparse.selection import above, batch_threshold, top_k, top_of_batch
from hagd.transcoders.sparse.support import Support

R = TypeVar("R")

_ROUNDING = ("bfloat16", "float8")
"""Selections that rank rounded inputs."""


class Codes(NamedTuple):
    """Sparse features of B tokens.

    Attributes:
        support: which pairs can be non-zero.
        values: `[n]`, never negative; differentiable.
        l0: mean number of active features a token; differentiable for JumpReLU only.
    """

    support: Support
    values: Tensor
    l0: Tensor


class Dictionary(nn.Module):
    """`f = activation(W_enc Rᵀ x + b_enc)`, written to T layers through `W_dec` `[m, T · d]`.

    R `[d, d]` (`basis`) is a fixed rotation to the principal axes of the inputs. Adam scales every entry of a gradient
    by itself; along these axes that also evens out how much the inputs vary (as SOAP does, Vyas et al. 2024).
    """

    basis: Tensor
    threshold_mean: Tensor

    def __init__(self, config: TranscoderConfig, d: int, n_targets: int, generator: torch.Generator) -> None:
        super().__init__()
        self.config = config
        self.d = d
        m = config.expansion * d
        rows = nn.functional.normalize(torch.randn(m, d, generator=generator), dim=-1)
        self.W_enc = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(m))
        self.W_dec = nn.Parameter(rows.repeat(1, n_targets) / n_targets)
        self.b_dec = nn.Parameter(torch.zeros(d))
        self.W_skip = nn.Parameter(torch.zeros(d, d)) if config.skip else None
        self.log_threshold = nn.Parameter(torch.zeros(m)) if config.activation == "jumprelu" else None
        self.register_buffer("basis", torch.eye(d))
        self.register_buffer("threshold_mean", torch.zeros(()))

    def forward(self, compute: Callable[..., R], *inputs: Any) -> R:
        """`compute(self, *inputs)`, a layer's whole part of a step: for its time divided weights are gathered."""
        return compute(self, *inputs)

    @property
    def m(self) -> int:
        """Dictionary size."""
        return len(self.W_enc)

    def turned(self, x: Tensor) -> Tensor:
        """Rows `[..., d]` in the basis of the encoder's rows. They decide what fires: CUDA's autocast rounds them only
        where the selection would."""
        rounds = x.is_cuda and self.config.selection in _ROUNDING and torch.is_autocast_enabled("cuda")
        with torch.autocast(x.device.type, enabled=rounds):
            if large_on_cpu(self.W_enc) and not (x.requires_grad and torch.is_grad_enabled()):
                return linear(x, self.basis.T)
            return x @ self.basis

    def encode(self, x: Tensor) -> Codes:
        """Features of scaled inputs `[B, d]`."""
        x = self.turned(x)
        match self.config.activation:
            case "topk":
                support, known = top_k(x, self.W_enc, self.b_enc, self.config.k, self.config.selection)
            case "batch_topk":
                support, known = top_of_batch(x, self.W_enc, self.b_enc, self.config.k)
            case "jumprelu":
                return self._jump(x)
            case "relu":
                support, known = above(x, self.W_enc, self.b_enc, x.new_zeros(()))
        values = gather_dot(x, support, self.W_enc, self.b_enc, known).relu()
        return Codes(support, values, (values > 0).sum() / len(x))

    def _jump(self, x: Tensor) -> Codes:
        threshold, width = self.thresholds(), self.config.bandwidth
        support, known = above(x, self.W_enc, self.b_enc, threshold.detach() - width / 2)
        z, chosen = gather_dot(x, support, self.W_enc, self.b_enc, known), threshold[support.index]
        values: Tensor = JumpReLU.apply(z, chosen, width)  # type: ignore[no-untyped-call]
        active: Tensor = Step.apply(z, chosen, width)  # type: ignore[no-untyped-call]
        return Codes(support, values, active.sum() / len(x))

    def thresholds(self) -> Tensor:
        """θ `[m]` of JumpReLU."""
        assert self.log_threshold is not None
        return self.log_threshold.exp()

    def write(self, codes: Codes) -> tuple[Tensor, ...]:
        """What the features add to each layer that they write to: T times `[B, d]`."""
        return self._by_layer(decode(codes.values, codes.support, self.W_dec))

    def write_and_measure(self, codes: Codes) -> tuple[tuple[Tensor, ...], Tensor]:
        """As `write`, and `lengths`."""
        if not large(self.W_dec):
            return self.write(codes), self.lengths()
        out, lengths = decode_and_lengths(codes.values, codes.support, self.W_dec)
        return self._by_layer(out), lengths

    def squared_error(self, codes: Codes, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of the reconstruction from scaled targets `[B, d]`, summed over tokens; `lengths`; and the error `[B, d]`."""
        return squared_error(codes.values, codes.support, self.W_dec, self.b_dec, target)

    def lengths(self) -> Tensor:
        """Norms `[m]` of the decoder rows, over all layers that they write to."""
        return row_norms(self.W_dec)

    def _by_layer(self, out: Tensor) -> tuple[Tensor, ...]:
        return (out,) if out.shape[1] == self.d else out.split(self.d, dim=1)

    def constant(self, x: Tensor) -> Tensor:
        """What the own layer gets beside features: the bias `[d]`, or with a skip `[B, d]`."""
        return self.b_dec if self.W_skip is None else self.b_dec + x @ self.W_skip

    @torch.no_grad()
    def start_at(self, x: Tensor) -> None:
        """Set thresholds or biases so that k features a token fire on `x`, where the activation function has no k."""
        if self.config.activation not in ("jumprelu", "relu"):
            return
        bound = batch_threshold(self.turned(x[:1024]), self.W_enc, self.b_enc, self.config.k)
        if self.log_threshold is not None:
            self.log_threshold.fill_(bound.clamp(min=1e-3).log())
        else:
            self.b_enc.sub_(bound)

    @torch.no_grad()
    def follow_threshold(self, codes: Codes) -> None:
        """Keep a running mean of the smallest kept pre-activation, with which BatchTopK infers token by token."""
        if self.config.activation == "batch_topk" and len(codes.values):
            smallest = codes.values.min()
            started = self.threshold_mean > 0
            self.threshold_mean.copy_(torch.where(started, self.threshold_mean.lerp(smallest, 0.01), smallest))
