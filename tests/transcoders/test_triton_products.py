"""The Triton kernels against dense products in double precision.

Tests marked `gpu` run on a CUDA device, or in Triton's interpreter (`test_triton_interpreter.py`).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.sparse import device_kernels, products
from hagd.transcoders.sparse.products import decode, gather_dot, squared_error, sum_by_feature, weighted_total
from hagd.transcoders.sparse.support import Support
from tests.transcoders.kernels import (
    DEVICE,
    ROUNDING,
    WIDE,
    assert_rounded,
    compiled,
    normal,
    on_a_device,
    pairs,
    triton_products_everywhere,
)
from tests.transcoders.test_products import PAIRS

pytest.importorskip("triton")

CROSS_LAYER = {"cross_layer": True}
ALONE = {"lambda_prediction": 0.0, "dead_fraction": 1e-9}


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The products of `DEVICE` run as Triton kernels."""
    return triton_products_everywhere(monkeypatch)


@on_a_device
@pytest.mark.parametrize(
    ("pattern", "d", "dtype"),
    [(pattern, 3, torch.float32) for pattern in PAIRS] + [("some", WIDE, dtype) for dtype in ROUNDING],
    ids=str,
)
def test_products_are_those_of_dense_matrices(kernels: ModuleType, pattern: str, d: int, dtype: torch.dtype) -> None:
    support, values, dense = pairs(pattern, dtype)
    a, weight = normal(1, support.n_tokens, d, dtype=dtype), normal(2, support.m, d, dtype=dtype)
    assert_rounded(decode(values, support, weight), dense @ weight.double(), dtype)
    assert_rounded(sum_by_feature(values, support, a), dense.T @ a.double(), dtype)
    dots = (a.double() @ weight.double().T)[support.token, support.index]
    summed = torch.promote_types(dtype, torch.float32)
    assert_rounded(gather_dot(a, support, weight, weight.new_zeros(support.m)), dots, summed)


@on_a_device
@pytest.mark.parametrize("transposed", [False, True])
def test_columns_of_another_matrix(kernels: ModuleType, transposed: bool) -> None:
    """Rows that do not lie one after another."""
    support, values, dense = pairs("some", torch.float32)
    whole = normal(1, 5, support.m, dtype=torch.float32).T if transposed else normal(1, support.m, 5).float()
    weight = whole[:, 1:4]
    assert not weight.is_contiguous()
    assert_rounded(decode(values, support, weight), dense @ weight.double(), torch.float32)
    a = normal(2, support.n_tokens, 3, dtype=torch.float32)
    dots = (a.double() @ weight.double().T)[support.token, support.index]
    assert_rounded(gather_dot(a, support, weight, weight.new_zeros(support.m)), dots, torch.float32)


@on_a_device
@pytest.mark.parametrize("pattern", ["some", "none", "few"])
def test_gradients_are_those_of_dense_products(kernels: ModuleType, pattern: str) -> None:
    support, values, dense = pairs(pattern, torch.float64)
    shapes = ((support.n_tokens, 3), (support.m, 3), (support.m,))
    a, weight, bias = (normal(i, *shape).requires_grad_() for i, shape in enumerate(shapes))
    direction = normal(3, support.n_tokens, 3)
    values.requires_grad_()
    dense.requires_grad_()

    found = torch.autograd.grad(decode(values, support, weight), (values, weight), direction)
    d_dense, d_weight = torch.autograd.grad(dense @ weight, (dense, weight), direction)
    torch.testing.assert_close(found[0], d_dense[support.token, support.index])
    torch.testing.assert_close(found[1], d_weight)

    upstream = values.detach()
    found = torch.autograd.grad(gather_dot(a, support, weight, bias), (a, weight, bias), upstream)
    dots = (a @ weight.T + bias)[support.token, support.index]
    torch.testing.assert_close(found, torch.autograd.grad(dots, (a, weight, bias), upstream))


@on_a_device
def test_norms_alone_have_a_derivative(kernels: ModuleType) -> None:
    support, values, _ = pairs("some", torch.float64)
    weight, bias = normal(0, support.m, 3).requires_grad_(), normal(1, 3)
    _, lengths, _ = squared_error(values, support, weight, bias, normal(2, support.n_tokens, 3))
    (found,) = torch.autograd.grad(lengths.sum(), weight)
    torch.testing.assert_close(found, (weight / weight.norm(dim=1, keepdim=True)).detach())


@on_a_device
@pytest.mark.parametrize("pattern", ["some", "none"])
def test_weighted_totals_and_their_gradients_are_those_of_dense_products(kernels: ModuleType, pattern: str) -> None:
    support, values, dense = pairs(pattern, torch.float64)
    by_feature = normal(0, support.m).requires_grad_()
    values.requires_grad_()
    total = weighted_total(values, support, by_feature)
    torch.testing.assert_close(total, (dense @ by_feature).sum())
    found = torch.autograd.grad(total, (values, by_feature))
    torch.testing.assert_close(found, (by_feature.detach()[support.index], dense.sum(0)))


@on_a_device
@pytest.mark.parametrize(("pattern", "d"), [("some", 3), ("none", 3), ("few", WIDE)])
def test_the_squared_error_and_its_gradients_are_those_of_dense_products(
    kernels: ModuleType, pattern: str, d: int
) -> None:
    support, values, dense = pairs(pattern, torch.float64)
    weight, bias = normal(0, support.m, d).requires_grad_(), normal(1, d).requires_grad_()
    target, scales = normal(2, support.n_tokens, d), normal(3, support.m)
    values.requires_grad_()
    dense.requires_grad_()
    squared, lengths, error = squared_error(values, support, weight, bias, target)
    found = torch.autograd.grad(3 * squared + scales @ lengths, (values, weight, bias))
    exact = dense @ weight + bias - target
    torch.testing.assert_close(error, exact)
    torch.testing.assert_close(squared, exact.square().sum())
    loss = 3 * exact.square().sum() + scales @ weight.norm(dim=1)
    d_dense, *others = torch.autograd.grad(loss, (dense, weight, bias))
    torch.testing.assert_close(found, (d_dense[support.token, support.index], *others))


@on_a_device
def test_rows_in_half_precision_leave_sums_in_single(kernels: ModuleType) -> None:
    """As under autocast: the only error is that of the rows' rounding."""
    support, values, dense = pairs("some", torch.float32)
    a, weight = (normal(i, n, WIDE).bfloat16() for i, n in enumerate((support.n_tokens, support.m)))
    assert_rounded(decode(values, support, weight), dense @ weight.double(), torch.float32)
    assert_rounded(sum_by_feature(values, support, a), dense.T @ a.double(), torch.float32)
    dots = (a.double() @ weight.double().T)[support.token, support.index]
    assert_rounded(gather_dot(a.float(), support, weight, values.new_zeros(support.m)), dots, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("expansion", [8, 16], ids=["small", "large"])
def test_a_step_under_autocast_is_one_with_rounded_rows(expansion: int) -> None:
    """Parameters and gradients stay in single precision, features are those of the step without."""
    config = TranscoderConfig.model_validate({"k": 8, "expansion": expansion, "selection": "bfloat16"})
    x, y = normal(0, 1, 256, 64, dtype=torch.float32), normal(1, 1, 256, 64, dtype=torch.float32)

    def step(precision: torch.dtype | None) -> tuple[Tensor, list[Tensor]]:
        stacked = StackedTranscoders(config, 1, 64, seed=0).cuda()
        with torch.autocast("cuda", precision, enabled=precision is not None):
            losses = stacked.losses(x, y, 0)
        losses.total.backward()
        return losses.fvu.detach(), [p.grad for p in stacked.parameters() if p.grad is not None]

    (fvu, exact), (half, rounded) = step(None), step(torch.bfloat16)
    torch.testing.assert_close(half, fvu, rtol=1e-3, atol=0)
    for one, other in zip(exact, rounded, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other) or one.ndim == 1
        assert (one - other).norm() < 0.01 * one.norm()


@on_a_device
def test_matrices_of_more_than_2_to_the_31_entries(kernels: ModuleType) -> None:
    """4 GiB are reserved, three rows of them are used."""
    last = 2**29 + 1
    matrix = torch.empty(last + 1, 4, dtype=torch.bfloat16, device=DEVICE)
    matrix[[0, 1, last]] = torch.arange(12.0, device=DEVICE).view(3, 4).bfloat16()
    index, offsets = torch.tensor([last, 0], device=DEVICE), torch.tensor([0, 2], device=DEVICE)
    ones = torch.ones(1, 4, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.row_dots(ones, index, offsets, matrix).tolist() == [38, 6]
    sums = kernels.segment_sums(torch.ones_like(index, dtype=torch.bfloat16), index, offsets[:-1], matrix)
    assert sums.tolist() == [[8, 10, 12, 14]]


@on_a_device
@pytest.mark.parametrize(
    ("activation", "large", "settings"),
    [
        ("topk", False, CROSS_LAYER),
        ("jumprelu", False, CROSS_LAYER),
        ("topk", True, CROSS_LAYER),
        ("topk", True, ALONE),
        ("topk", True, {**ALONE, "skip": True}),
        ("topk", True, {}),
    ],
    ids=["topk", "jumprelu", "large", "alone", "with_a_skip", "with_heads"],
)
def test_a_training_step_is_that_of_torch_operators(
    activation: str, large: bool, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hagd.transcoders.sparse import triton_products

    if large:
        monkeypatch.setattr(device_kernels, "_LARGE", 1)
    config = TranscoderConfig.model_validate({"k": 2, "expansion": 3, "activation": activation, **settings})
    x, y = normal(0, 2, 4, 5, dtype=torch.float32), normal(1, 2, 4, 5, dtype=torch.float32)

    def step() -> tuple[Tensor, list[Tensor]]:
        stacked = StackedTranscoders(config, 2, 5, seed=0).to(DEVICE)
        for number in range(3):  # AuxK learns late how many features are dead
            total = stacked.losses(x, y, number).total
        total.backward()
        return total.detach(), [p.grad for p in stacked.parameters() if p.grad is not None]

    monkeypatch.setattr(products, "product_kernels", lambda m, *operands: None)
    expected = step()
    monkeypatch.setattr(products, "product_kernels", lambda m, *operands: triton_products)
    fused: list[int] = []
    errors = triton_products.segment_errors

    def noting(*operands: Tensor) -> tuple[Tensor, Tensor]:
        fused.append(len(operands))
        return errors(*operands)

    monkeypatch.setattr(triton_products, "segment_errors", noting)
    found = step()
    assert bool(fused) == (settings is ALONE), "decoder and error in one where nothing else reads what is written"
    assert len(found[1]) > 6 and any(grad.abs().max() > 1e-3 for grad in found[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_large_batch_on_a_gpu() -> None:
    """Against torch on the CPU, with features that are active everywhere; the same bits twice."""
    n_tokens, m, d, k = 4096, 8192, 520, 32
    g = torch.Generator().manual_seed(0)
    rare = torch.rand(n_tokens, m - 2, generator=g).topk(k - 2).indices + 2
    index = torch.cat([torch.arange(2).expand(n_tokens, 2), rare], 1).flatten()
    here = Support(index, torch.arange(0, len(index) + 1, k), m)
    there = Support(index.cuda(), here.offsets.cuda(), m)
    a, weight, values = (torch.randn(*shape, generator=g) for shape in ((n_tokens, d), (m, d), (len(index),)))
    zeros = torch.zeros(m)
    expected = (
        decode(values, here, weight),
        sum_by_feature(values, here, a),
        gather_dot(a, here, weight, zeros),
    )
    operands = a.cuda(), weight.cuda(), values.cuda(), zeros.cuda()

    def on_gpu() -> tuple[Tensor, ...]:
        a_gpu, weight_gpu, values_gpu, zeros_gpu = operands
        return (
            decode(values_gpu, there, weight_gpu),
            sum_by_feature(values_gpu, there, a_gpu),
            gather_dot(a_gpu, there, weight_gpu, zeros_gpu),
        )

    assert products.product_kernels(m, operands[0]) is not None
    first, second = on_gpu(), on_gpu()
    for one, other, exact in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.cpu(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter takes more than the compiler. Gathers are vectors of 16 bytes, nothing is atomic."""
    from hagd.transcoders.sparse import triton_product_kernels as device_code
    from hagd.transcoders.sparse import triton_products as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    matrix, int64 = f"*{dtype}", "*i64"
    sums = dict(out="*fp32", values="*fp32", rows=int64, starts=int64, ends=int64, matrix=matrix)
    tiles = [dict(ROWS=rows, COLUMNS=columns) for columns, rows in kernels._SUM_TILES]
    built = [
        compiled(device_code.sum_rows, sums, ("d",), 1, ADD=add, **tile)
        for tile, add in zip(tiles, (0, 1), strict=True)
    ]
    errors = dict(error=matrix, squared="*fp32", values="*fp32", rows=int64, offsets=int64)
    errors |= dict(matrix=matrix, bias="*fp32", target="*fp32")
    built += [compiled(device_code.error_rows, errors, ("d",), 1, **tile) for tile in tiles]
    dots = dict(partial="*fp32", a="*fp32", index=int64, offsets=int64, matrix=matrix)
    sizes = dict(PAIRS=kernels._PAIRS, SLAB=kernels._SLAB)
    built.append(compiled(device_code.dot_rows, dots, ("n", "d"), 1, **sizes))
    assert all("ld.global.v4" in stages["ptx"] for stages in built)
    added = dict(out="*fp32", pieces="*fp32", segment=int64, first=int64, last=int64)
    built.append(compiled(device_code.sum_pieces, added, ("n_segments", "d"), 4, ADD=1, COLUMNS=256))
    summed = dict(out="*fp32", values="*fp32", starts=int64, ends=int64)
    built.append(compiled(device_code.sum_values, summed, (), 4, BLOCK=kernels._VALUES))
    assert all("atom" not in stages["ptx"] and stages["cubin"] for stages in built)
