"""The compiled top k against torch's."""

from __future__ import annotations

import pytest
import torch

from hagd.transcoders.sparse import cpu_selection
from hagd.transcoders.sparse.cpu_library import library
from hagd.transcoders.sparse.cpu_selection import top_of_rows, top_of_segments
from hagd.transcoders.sparse.device_kernels import selection_kernels
from tests.transcoders.rows import assert_largest, rows

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 5), (70, 7), (2048, 64), (4100, 64), (9000, 700), (70_000, 3)])
def test_top_of_rows_of_any_shape_is_that_of_torch(m: int, k: int, dtype: torch.dtype, threads: int) -> None:
    pre = rows(m, dtype)
    assert_largest(*top_of_rows(pre, k), pre, k)


def test_top_of_segments_is_that_of_torch(threads: int) -> None:
    """Some are empty; of numbers that are the same the first are taken, and NaN is the largest."""
    counts = torch.tensor([9, 0, 4, 30, 0])
    values = torch.randn(43, generator=torch.Generator().manual_seed(0)).round() + 0.0  # no -0.0
    values[20] = torch.nan
    expected, start = [], 0
    for count in counts.tolist():
        segment = values[start : start + count]
        chosen = segment.sort(descending=True, stable=True).indices[:4] if count else segment[:0].long()
        expected += sorted((start + chosen).tolist())
        start += count
    assert top_of_segments(values, counts, 4).tolist() == expected


def test_rows_of_a_wider_or_transposed_matrix() -> None:
    pre = rows(50, torch.float32)
    for other in (torch.cat([pre, pre + 9], dim=1)[:, :50], pre.T.contiguous().T):
        assert torch.equal(top_of_rows(other[:5], 4)[1], top_of_rows(pre[:5], 4)[1])


def test_what_else_there_is_is_left_to_others() -> None:
    assert selection_kernels(torch.zeros(1, 1024), 4) is cpu_selection
    assert selection_kernels(torch.zeros(1, 1023), 4) is None
    assert selection_kernels(torch.zeros(1, 1024, dtype=torch.float64), 4) is None


@pytest.mark.parametrize("k", [0, 9])
def test_more_than_there_are_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=f"of 8 columns the {k} largest"):
        top_of_rows(torch.zeros(2, 8), k)
