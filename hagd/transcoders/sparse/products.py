"""Products with matrices of which only k of m columns a token are non-zero, forward and backward.

Everything a sparse dictionary trains with is one of three sums over the active pairs (token t, feature j):

- `decode`: `out_t = Σ_j v_tj W_j`,
- `gather_dot`: `p_tj = a_t · W_j`,
- `sum_by_feature`: `out_j = Σ_t v_tj a_t`,

and each is the derivative of another, so no gradient ever needs a dense tokens × features tensor. `squared_error` is a
`decode` that goes no further, `weighted_total` one of a single column. On a CUDA device they run as Triton kernels
(`triton_products`), for large dictionaries in float32 on a CPU as compiled loops (`cpu_products`), and else, or where
Triton or GCC is missing, as torch operators. Under CUDA's autocast
(`trainer.precision=bf16-mixed`) rows are gathered from copies in its precision, which halves what is read, and so are
the errors of `squared_error`; sums and their results stay in float32.

Shape legend: B tokens, n active pairs in all, m features, d columns of a matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hagd.transcoders.sparse.device_kernels import product_kernels
from hagd.transcoders.sparse.support import Support

_CACHED, _CACHED_ROWS = 2**24, 2**23
"""Bytes of a matrix that a CPU's last-level cache, shared as it is, can be expected to hold, and of rows beside it."""

_FEWEST_TOKENS = 256
"""Whose rows are held at once, however long they are."""

_LEAST_PAIRS = 32
"""Of a feature on average, which make up for adding the sums of one more part."""


def decode(values: Tensor, support: Support, weight: Tensor) -> Tensor:
    """`out_t = Σ_j v_tj W_j`: `[B, d]` of values `[n]` and a matrix `[m, d]`; differentiable in both."""
    return _Decode.apply(values, weight, support)  # type: ignore[no-untyped-call]


def decode_and_lengths(values: Tensor, support: Support, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `decode`, with the norms `[m]` of the matrix' rows; both have one derivative, not two and their sum."""
    return _DecodeAndLengths.apply(values, weight, support)  # type: ignore[no-untyped-call]


def squared_error(
    values: Tensor, support: Support, weight: Tensor, bias: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`Σ_t ‖Σ_j v_tj W_j + b − y_t‖²`, the norms `[m]` of the matrix' rows, and the error `[B, d]` itself.

    All but the target and the error are differentiable. The derivative is the error, but for a factor, so that nothing
    of its size is made of it; it is kept in the precision in which its rows are gathered. For `fuses(weight)` only.
    """
    return _SquaredError.apply(values, weight, bias, target, support)  # type: ignore[no-untyped-call]


def squared_norm(a: Tensor) -> Tensor:
    """`Σ a²` over all entries of `[B, d]`, differentiable."""
    return _SquaredNorm.apply(a)  # type: ignore[no-untyped-call]


def fuses(weight: Tensor) -> bool:
    """Whether `squared_error` takes a matrix `[m, d]` of this device, size and precision."""
    return product_kernels(len(weight), weight) is not None


def row_norms(weight: Tensor) -> Tensor:
    """`‖W_j‖`: `[m]`, differentiable."""
    return _RowNorms.apply(weight)  # type: ignore[no-untyped-call]


def weighted_total(values: Tensor, support: Support, by_feature: Tensor) -> Tensor:
    """`Σ_tj v_tj c_j` of values `[n]` and a number a feature `[m]`; differentiable in both."""
    return _WeightedTotal.apply(values, by_feature, support)  # type: ignore[no-untyped-call]


def gather_dot(a: Tensor, support: Support, weight: Tensor, bias: Tensor, known: Tensor | None = None) -> Tensor:
    """`p_tj = a_t · W_j + b_j`: `[n]` of rows `[B, d]`, a matrix `[m, d]` and `[m]`; differentiable in all three.

    Args:
        a: rows.
        support: the pairs.
        weight: matrix.
        bias: by feature.
        known: the result, where a dense product has computed it already; then only the derivative is built.
    """
    return _GatherDot.apply(a, weight, bias, support, known)  # type: ignore[no-untyped-call]


def _decode(values: Tensor, support: Support, weight: Tensor) -> Tensor:
    if (kernels := product_kernels(support.m, values, weight)) is not None:
        return kernels.segment_sums(values, support.index, support.offsets[:-1], weight)
    return embedding_bag(support.index, weight, support.offsets[:-1], mode="sum", per_sample_weights=values)


def sum_by_feature(values: Tensor, support: Support, a: Tensor) -> Tensor:
    """`out_j = Σ_t v_tj a_t`: `[m, d]` of values `[n]` and rows `[B, d]`; without gradient."""
    if (kernels := product_kernels(support.m, values, a)) is not None:
        n_parts = kernels.parts_of(a, len(values), support.m)
        order, token, starts = support.by_part_and_feature(n_parts)
        return kernels.long_segment_sums(values.index_select(0, order), token, starts, a, n_parts)
    parts = _parts(a, support, _LEAST_PAIRS) if _too_large(a) else [support]
    sums = map(_segment_sums, values.split([len(part.index) for part in parts]), parts, _rows(a, parts))
    total = next(sums)
    for more in sums:
        total.add_(more)
    return total


def _segment_sums(values: Tensor, support: Support, a: Tensor) -> Tensor:
    order, token, offsets = support.by_feature
    return embedding_bag(token, a, offsets, mode="sum", per_sample_weights=values.index_select(0, order))


def _sum_values_by_feature(values: Tensor, support: Support) -> Tensor:
    """`out_j = Σ_t v_tj`: `[m]` of values `[n]`."""
    if (kernels := product_kernels(support.m, values)) is not None:  # on a GPU index_add_ adds in no fixed order
        order, _, starts = support.in_any_order
        return kernels.value_sums(values.index_select(0, order), starts).view(-1, support.m).sum(0)
    return values.new_zeros(support.m).index_add_(0, support.index, values)


def _gather_dot(a: Tensor, support: Support, weight: Tensor) -> Tensor:
    if _too_large(weight) and len(support.index) >= support.m:
        return _gather_dot_by_feature(a, support, weight)
    return _dots(a, support.index, support.offsets, weight, support.m)


def _gather_dot_by_feature(a: Tensor, support: Support, weight: Tensor) -> Tensor:
    """The same bits. Where the cache does not hold the matrix, it holds so many of the other rows that each row of the
    matrix meets all of them at once."""
    parts, products = _parts(a, support, 1), []
    for part, rows in zip(parts, _rows(a, parts), strict=True):
        order, token, starts = part.by_feature
        ordered = _dots(weight, token, torch.cat([starts, starts.new_tensor([len(order)])]), rows, support.m)
        products.append(torch.empty_like(ordered).index_copy_(0, order, ordered))
    return torch.cat(products)


def _dots(rows: Tensor, index: Tensor, offsets: Tensor, others: Tensor, m: int) -> Tensor:
    """`[n]`: every row with those of the others that compressed rows name; m features are one of both."""
    if (kernels := product_kernels(m, rows, others)) is not None:
        return kernels.row_dots(rows, index, offsets, others)
    pattern = torch.sparse_csr_tensor(offsets, index, rows.new_zeros(len(index)), size=(len(rows), len(others)))
    return torch.sparse.sampled_addmm(pattern, rows, others.T, beta=0.0).values()


def _too_large(matrix: Tensor) -> bool:
    """For a CPU's cache."""
    return matrix.device.type == "cpu" and matrix.nbytes > _CACHED


def _parts(a: Tensor, support: Support, least: int) -> list[Support]:
    """As many tokens as the cache holds rows `a` of, or more, so that a part has `least` pairs a feature on average."""
    enough = least * support.m * support.n_tokens // max(1, len(support.index))
    return support.parts(max(_FEWEST_TOKENS, enough, _CACHED_ROWS // (a.element_size() * max(1, a.shape[1]))))


def _rows(a: Tensor, parts: Sequence[Support]) -> tuple[Tensor, ...]:
    return a.split([part.n_tokens for part in parts])


with warnings.catch_warnings():  # torch says once a process that its compressed sparse layout is in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.tensor([], dtype=torch.long), torch.tensor([]), size=(1, 1))


def _gathered(matrix: Tensor) -> Tensor:
    """What rows are gathered from."""
    if matrix.is_cuda and torch.is_autocast_enabled("cuda"):
        return matrix.to(torch.get_autocast_dtype("cuda"))
    return matrix


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, support: Support) -> Tensor:
        weight = _gathered(weight)
        ctx.save_for_backward(values, weight)
        ctx.support = support
        return _decode(values, support, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, weight = ctx.saved_tensors
        return *_decode_derivatives(gradients[0], values, weight, ctx.support, ctx.needs_input_grad), None


class _DecodeAndLengths(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, weight: Tensor, support: Support) -> tuple[Tensor, Tensor]:
        gathered, lengths = _gathered(weight), weight.norm(dim=-1)
        ctx.save_for_backward(values, gathered, weight, lengths)
        ctx.support = support
        return _decode(values, support, gathered), lengths

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, gathered, weight, lengths = ctx.saved_tensors
        d_values, d_weight = _decode_derivatives(gradients[0], values, gathered, ctx.support, ctx.needs_input_grad)
        if d_weight is not None:
            d_weight.addcmul_(weight, _by_row(gradients[1], lengths))
        return d_values, d_weight, None


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, weight: Tensor, bias: Tensor, target: Tensor, support: Support
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = product_kernels(support.m, weight, values, bias)
        assert kernels is not None
        gathered, lengths = _gathered(weight), weight.norm(dim=-1)
        made = kernels.segment_errors(values, support.index, support.offsets, gathered, bias, target)
        error, squared, products = made
        ctx.save_for_backward(values, gathered, weight, lengths, error, products)
        ctx.support = support
        if any(ctx.needs_input_grad):  # now, so that all sums by feature share this order
            support.by_part_and_feature(kernels.parts_of(error, len(values), support.m))
        ctx.mark_non_differentiable(error)
        ctx.set_materialize_grads(False)  # one of zeros for the error
        return squared, lengths, error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        values, gathered, weight, lengths, error, products = ctx.saved_tensors
        twice = 2 * (lengths.new_zeros(()) if gradients[0] is None else gradients[0])
        needed = ctx.needs_input_grad[0] and products is None, ctx.needs_input_grad[1]
        d_values, d_weight = _decode_derivatives(error, twice * values, gathered, ctx.support, needed)
        if ctx.needs_input_grad[0] and products is not None:
            d_values = products
        if d_values is not None:
            d_values = twice * d_values
        if d_weight is not None and gradients[1] is not None:
            d_weight.addcmul_(weight, _by_row(gradients[1], lengths))
        d_bias = twice * error.sum(0, dtype=twice.dtype) if ctx.needs_input_grad[2] else None
        return d_values, d_weight, d_bias, None, None


def _decode_derivatives(
    gradient: Tensor, values: Tensor, weight: Tensor, support: Support, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Of `decode` in values and matrix."""
    gradient = gradient.contiguous()
    d_values = _gather_dot(gradient, support, weight) if needed[0] else None
    d_weight = sum_by_feature(values, support, gradient.to(weight.dtype)) if needed[1] else None
    return d_values, d_weight


class _GatherDot(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor, support: Support, known: Tensor | None) -> Tensor:
        if known is None or ctx.needs_input_grad[0]:
            weight = _gathered(weight)
        ctx.save_for_backward(_gathered(a), weight)
        ctx.support = support
        return _gather_dot(a, support, weight) + bias.index_select(0, support.index) if known is None else known.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        (a, weight), support = ctx.saved_tensors, ctx.support
        gradient = gradients[0].contiguous()
        d_a = _decode(gradient, support, weight) if ctx.needs_input_grad[0] else None
        d_weight = sum_by_feature(gradient, support, a) if ctx.needs_input_grad[1] else None
        d_bias = _sum_values_by_feature(gradient, support) if ctx.needs_input_grad[2] else None
        return d_a, d_weight, d_bias, None, None


class _WeightedTotal(torch.autograd.Function):
    """torch's own derivative sorts the pairs, which are sorted by feature already where kernels run."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, by_feature: Tensor, support: Support) -> Tensor:
        of_pairs = by_feature.index_select(0, support.index)
        ctx.save_for_backward(values, of_pairs)
        ctx.support = support
        return torch.dot(values, of_pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, of_pairs = ctx.saved_tensors
        d_values = gradients[0] * of_pairs if ctx.needs_input_grad[0] else None
        d_by_feature = _sum_values_by_feature(gradients[0] * values, ctx.support) if ctx.needs_input_grad[1] else None
        return d_values, d_by_feature, None


class _RowNorms(torch.autograd.Function):
    """torch's own derivative makes four tensors of the matrix's size, this one a single one."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        norms = weight.norm(dim=-1)
        ctx.save_for_backward(weight, norms)
        return norms

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        weight, norms = ctx.saved_tensors
        return weight * _by_row(gradients[0], norms)


class _SquaredNorm(torch.autograd.Function):
    """With no other tensor of `a`'s size than its derivative."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return torch.linalg.vector_norm(a, dim=-1).square().sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return a * (2 * gradients[0])


def _by_row(gradient: Tensor, norms: Tensor) -> Tensor:
    """What a row is multiplied with, `[m, 1]`, in the derivative of its norm."""
    return (gradient / norms.clamp(min=1e-12))[:, None]
