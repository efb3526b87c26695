"""Sums over segments of pairs by Triton kernels: in pieces, in parts, by tiles.

Tests marked `gpu` run on a CUDA device, or in Triton's interpreter (`test_triton_interpreter.py`).
"""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from hagd.transcoders.sparse import products
from hagd.transcoders.sparse.products import sum_by_feature
from tests.transcoders.kernels import (
    DEVICE,
    ROUNDING,
    WIDE,
    assert_rounded,
    normal,
    on_a_device,
    pairs,
    triton_products_everywhere,
)

pytest.importorskip("triton")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The products of `DEVICE` run as Triton kernels."""
    return triton_products_everywhere(monkeypatch)


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
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_parts_of_the_tokens_that_the_cache_holds_are_summed_one_after_another(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Three of them, with features in pieces, in a part alone, and nowhere."""
    monkeypatch.setattr(kernels, "_PIECE", 4)
    monkeypatch.setattr(kernels, "_TAIL", 0)
    monkeypatch.setattr(kernels, "_LEAST_PAIRS", 0.5)
    support, values, dense = pairs("some", dtype)
    a = normal(1, support.n_tokens, WIDE, dtype=dtype)
    bytes_held = -(-len(a) // 3) * kernels._SUM_TILES[0].columns * a.element_size()
    monkeypatch.setattr(kernels, "_cache_bytes", lambda device: bytes_held / kernels._CACHED)
    assert kernels.parts_of(a, len(values), support.m) == 3
    found = sum_by_feature(values, support, a)
    assert_rounded(found, dense.T @ a.double(), dtype)
    assert len(support.by_part_and_feature(3)[2]) == 3 * support.m
    sums = products._sum_values_by_feature(values, support)
    torch.testing.assert_close(sums.double(), dense.sum(0), rtol=ROUNDING[dtype], atol=min(ROUNDING[dtype], 1e-2))


@on_a_device
def test_only_long_segments_are_split(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of the module: one feature active on every token among many rare ones."""
    lengths = [1] * 16 + [300] + [1] * 8
    launched: list[int] = []
    launch = kernels._launch_sums

    def counting(out: Tensor, *operands: Tensor, add: bool) -> None:
        launched.append(len(out))
        launch(out, *operands, add=add)

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
def test_tiles_are_as_wide_as_the_cache_holds(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 5 rows of float32, 256 columns are 5,120 bytes."""
    lengths = [0, 7, 30, 1, 8]
    values, rows, starts = segments(lengths, 0)
    matrix, chosen = normal(1, 5, WIDE, dtype=torch.float32), []
    for cache_bytes in (10_240, 10_239, 0):
        monkeypatch.setattr(kernels, "_cache_bytes", lambda device, size=cache_bytes: size)
        chosen.append(kernels._tile(matrix)[0])
        found = kernels.segment_sums(values, rows, starts, matrix)
        assert_rounded(found, dense_sums(values, rows, lengths, matrix), torch.float32)
    assert chosen == [256, 128, 128]
