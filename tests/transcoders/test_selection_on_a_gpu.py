"""What selections do differently off the CPU."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from hagd.config.transcoder import Selection
from hagd.transcoders.sparse import chunks
from hagd.transcoders.sparse.selection import top_k


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [
        ("meta", torch.bfloat16, [2048, 2048, 904]),
        ("meta", torch.float32, [1024] * 4 + [904]),
        ("meta", torch.int8, [512] * 9 + [392]),
        ("cpu", torch.bfloat16, [512] * 9 + [392]),
        ("cpu", torch.int8, [256] * 19 + [136]),
    ],
)
def test_chunks_are_as_large_as_their_bytes_allow_but_on_a_cpu(
    device: str, dtype: torch.dtype, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    m = 64
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 2048 * m * 2)
    x, weight, bias = (torch.zeros(shape, device=device) for shape in ((5000, 2), (m, 2), (m,)))
    assert list(chunks.by_chunks(x, weight, bias, dtype, len)) == expected


def test_a_chunk_has_at_least_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "_CHUNK_BYTES", 1)
    x, weight, bias = (torch.zeros(shape, device="meta") for shape in ((3, 2), (64, 2), (64,)))
    assert list(chunks.by_chunks(x, weight, bias, x.dtype, len)) == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("by", get_args(Selection))
def test_top_k_on_a_gpu_is_that_of_the_cpu_and_never_waits(by: Selection) -> None:
    g = torch.Generator().manual_seed(0)
    operands = [torch.randn(*shape, generator=g) for shape in ((300, 64), (1024, 64), (1024,))]
    expected, _ = top_k(operands[0], operands[1], operands[2], 16)
    x, weight, bias = (each.cuda() for each in operands)
    top_k(x, weight, bias, 16, by)  # compiles and tunes the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        support, values = top_k(x, weight, bias, 16, by)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = (x @ weight.T + bias)[support.token, support.index]
    torch.testing.assert_close(values, exact, rtol=1e-3, atol=1e-3)
    same = [set(a) & set(b) for a, b in zip(_rows(support.index.cpu()), _rows(expected.index), strict=True)]
    assert sum(map(len, same)) > {"bfloat16": 0.985, "float8": 0.94}.get(by, 0.999) * 300 * 16


def _rows(index: torch.Tensor) -> list[list[int]]:
    return index.view(300, 16).tolist()
