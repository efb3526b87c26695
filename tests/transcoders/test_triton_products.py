"""The Triton kernels against dense products in double precision.

Tests marked `gpu` run on a CUDA device, or in Triton's interpreter (`test_triton_interpreter.py`).
"""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from hagd.config.transcoder import TranscoderConfig
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.sparse import chunks, products
from hagd.transcoders.sparse.products import decode, gather_dot, sum_by_feature
from hagd.transcoders.sparse.support import Support
from tests.transcoders.kernels import DEVICE, INTERPRETED, compiled, on_a_device
from tests.transcoders.test_products import PAIRS, random_pairs

pytest.importorskip("triton")

WIDE = 300  # more than one slab of columns, and no multiple of a tile
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
"""Relative; the interpreter cuts float32 to bfloat16 off, a GPU rounds to the nearest."""


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The products of `DEVICE` run as Triton kernels."""
    from hagd.transcoders.sparse import triton_products

    monkeypatch.setattr(products, "_kernels", lambda operand: triton_products)
    return triton_products


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype)


def pairs(pattern: str, dtype: torch.dtype) -> tuple[Support, Tensor, Tensor]:
    """A support, values `[n]`, and both as a dense float64 matrix `[B, m]`."""
    support, values, _ = random_pairs(0, *PAIRS[pattern])
    support = Support(support.index.to(DEVICE), support.offsets.to(DEVICE), support.m)
    values = values.to(DEVICE, dtype)
    dense = torch.zeros(support.n_tokens, support.m, dtype=torch.float64, device=DEVICE)
    dense[support.token, support.index] = values.double()
    return support, values, dense


def assert_rounded(found: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=ROUNDING[dtype], atol=min(ROUNDING[dtype], 1e-5))


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
    assert_rounded(gather_dot(a, support, weight, weight.new_zeros(support.m)), dots, dtype)


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


def segments(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values and rows (of 5) of the pairs, and where the segments start."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.tensor(lengths)
    n = int(counts.sum())
    values, rows = torch.randn(n, generator=g), torch.randint(5, (n,), generator=g)
    return values.to(DEVICE), rows.to(DEVICE), (counts.cumsum(0) - counts).to(DEVICE)


def dense_sums(values: Tensor, rows: Tensor, lengths: list[int], matrix: Tensor) -> Tensor:
    products_of_pairs = values.double()[:, None] * matrix.double()[rows]
    return torch.stack([part.sum(0) for part in products_of_pairs.split(lengths)])


@on_a_device
@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [(lengths, torch.float32) for lengths in ([0, 0, 20], [20, 0, 0], [8] * 2, [9] * 2)]
    + [([0, 33, 3, 0, 8, 9, 1, 16, 17, 0], dtype) for dtype in ROUNDING],
    ids=str,
)
def test_long_segments_are_summed_in_pieces(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, lengths: list[int], dtype: torch.dtype
) -> None:
    """Pieces of 8: one more than a piece, whole pieces, and empty segments at either end."""
    monkeypatch.setattr(kernels, "_PIECE", 8)
    monkeypatch.setattr(kernels, "_TAIL", 0)
    values, rows, starts = segments(lengths, 0)
    values, matrix = values.to(dtype), normal(1, 5, 6, dtype=dtype)
    found = kernels.long_segment_sums(values, rows, starts, matrix)
    assert_rounded(found, dense_sums(values, rows, lengths, matrix), dtype)


@on_a_device
def test_only_long_segments_are_split(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of the module: one feature active on every token among many rare ones."""
    lengths = [1] * 16 + [300] + [1] * 8
    launched: list[int] = []
    launch = kernels._launch_sums

    def counting(out: Tensor, *operands: Tensor) -> None:
        launched.append(len(out))
        launch(out, *operands)

    monkeypatch.setattr(kernels, "_launch_sums", counting)
    values, rows, starts = segments(lengths, 0)
    matrix = normal(1, 5, 3, dtype=torch.float32)
    found = kernels.long_segment_sums(values, rows, starts, matrix)
    assert_rounded(found, dense_sums(values, rows, lengths, matrix), torch.float32)
    assert launched == [2 * len(values) // kernels._PIECE, len(lengths)]


@on_a_device
def test_pieces_are_not_rounded(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 + 1 has no bfloat16, so (256 + 1 + 0 …) + (−256 + 0 …) would be 0 with pieces in bfloat16."""
    monkeypatch.setattr(kernels, "_PIECE", 8)
    monkeypatch.setattr(kernels, "_TAIL", 0)
    values = torch.tensor([256.0, 1] + [0] * 6 + [-256.0] + [0] * 3, dtype=torch.bfloat16, device=DEVICE)
    rows, starts = torch.zeros(12, dtype=torch.long, device=DEVICE), torch.zeros(1, dtype=torch.long, device=DEVICE)
    matrix = torch.ones(1, 2, dtype=torch.bfloat16, device=DEVICE)
    assert kernels.long_segment_sums(values, rows, starts, matrix).tolist() == [[1, 1]]


@on_a_device
def test_the_width_of_tiles_changes_no_bit(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is chosen by what the cache holds: at 5 rows of float32, 1,024 columns are 20,480 bytes."""
    values, rows, starts = segments([0, 7, 30, 1, 8], 0)
    matrix = normal(1, 5, WIDE, dtype=torch.float32)
    chosen, results = [], []
    for cache_bytes in (20_480 / 0.75, 20_479 / 0.75, 5_120 / 0.75, 0):
        monkeypatch.setattr(kernels, "_cache_bytes", lambda device, size=cache_bytes: size)
        chosen.append(kernels._tile(matrix)[0])
        results.append(kernels.segment_sums(values, rows, starts, matrix))
    assert chosen == [1024, 512, 256, 256]
    assert all(torch.equal(results[0], each) for each in results[1:])


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
    ("activation", "large"), [("topk", False), ("jumprelu", False), ("topk", True)], ids=["topk", "jumprelu", "large"]
)
def test_a_training_step_is_that_of_torch_operators(
    activation: str, large: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hagd.transcoders.sparse import triton_products

    if large:
        monkeypatch.setattr(chunks, "_LARGE", 1)
    config = TranscoderConfig.model_validate({"k": 2, "expansion": 3, "activation": activation, "cross_layer": True})
    x, y = normal(0, 2, 4, 5, dtype=torch.float32), normal(1, 2, 4, 5, dtype=torch.float32)

    def step() -> tuple[Tensor, list[Tensor]]:
        stacked = StackedTranscoders(config, 2, 5, seed=0).to(DEVICE)
        total = stacked.losses(x, y, 0).total
        total.backward()
        return total.detach(), [p.grad for p in stacked.parameters() if p.grad is not None]

    monkeypatch.setattr(products, "_kernels", lambda operand: None)
    expected = step()
    monkeypatch.setattr(products, "_kernels", lambda operand: triton_products)
    found = step()
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

    assert products._kernels(operands[0]) is not None
    first, second = on_gpu(), on_gpu()
    for one, other, exact in zip(first, second, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one.cpu(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kernels_compile_for_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The interpreter takes more than the compiler. Gathers are vectors of 16 bytes, nothing is atomic."""
    from hagd.transcoders.sparse import triton_products as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    matrix, int64 = f"*{dtype}", "*i64"
    tiles = kernels._SUM_TILES if dtype == "fp32" else kernels._SUM_TILES[-1:]
    sums = dict(out="*fp32", values="*fp32", rows=int64, starts=int64, ends=int64, matrix=matrix)
    built = [
        compiled(kernels._sum_rows, sums, ("d",), warps, ROWS=kernels._ROWS, COLUMNS=columns)
        for columns, warps in tiles
    ]
    for stages in built:
        (layout,) = re.findall(r"threadsPerWarp = \[(\d+), \d+\], warpsPerCTA = \[(\d+), \d+\]", stages["ttgir"])
        assert layout == ("1", "1"), "a column is summed by one thread"
    dots = dict(partial="*fp32", a="*fp32", index=int64, offsets=int64, matrix=matrix)
    sizes = dict(PAIRS=kernels._PAIRS, COLUMNS=kernels._COLUMNS, SLAB=kernels._SLAB)
    built.append(compiled(kernels._dot_rows, dots, ("n", "d"), 4, **sizes))
    assert all("ld.global.v4" in stages["ptx"] for stages in built)
    added = dict(out="*fp32", pieces="*fp32", segment=int64, first=int64, last=int64)
    built.append(compiled(kernels._sum_pieces, added, ("n_segments", "d"), 4, COLUMNS=256))
    assert all("atom" not in stages["ptx"] and stages["cubin"] for stages in built)


def test_a_cpu_runs_torch_operators() -> None:
    assert products._kernels(torch.zeros(1)) is None
