"""Features ranked by a product in float8.

The test marked `gpu` runs on a CUDA device, or in Triton's interpreter (`test_triton_interpreter.py`).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hagd.config.transcoder import Selection
from hagd.transcoders.sparse import chunks
from hagd.transcoders.sparse.chunks import by_chunks, to_float8
from hagd.transcoders.sparse.selection import top_k
from tests.transcoders.kernels import DEVICE, INTERPRETED, compiled, on_a_device

K = 32
FLOAT8 = torch.float8_e4m3fn


def case(m: int = 512, d: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(m, d, generator=g), dim=1)
    return torch.randn(400, d, generator=g), weight, 0.3 * torch.randn(m, generator=g)


def in_float8(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.cat(list(by_chunks(x, weight, bias, FLOAT8, Tensor.clone)))


def rounded(rows: Tensor) -> Tensor:
    """What a row's largest entry being 448 leaves of the others, in double precision."""
    unit = rows.double().abs().amax(1, keepdim=True) / 448
    return (rows / unit).float().to(FLOAT8).double() * unit


def right(x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """Share of the pairs of the exact top k that are found."""
    exact = (x.double() @ weight.double().T + bias).topk(K).indices
    support, _ = top_k(x, weight, bias, K, "float8")
    found = torch.zeros(len(x), len(weight), dtype=torch.bool)
    found[support.token, support.index] = True
    return float(found.gather(1, exact).float().mean())


@pytest.mark.parametrize(("m", "d"), [(512, 64), (50, 13)], ids=["multiples of sixteen", "others"])
def test_the_product_is_that_of_rounded_rows(m: int, d: int) -> None:
    x, weight, bias = case(m, d)
    pre = in_float8(x, weight, bias)
    assert pre.dtype == torch.bfloat16 and pre.shape == (400, m)
    exact = rounded(x) @ rounded(weight).T + bias
    torch.testing.assert_close(pre.double(), exact, rtol=2**-7, atol=0.02)
    assert (pre.double() - exact).norm() < 0.1 * (x.double() @ weight.double().T + bias - exact).norm()


def test_nearly_all_of_the_largest_are_found_and_computed_in_full() -> None:
    x, weight, bias = case()
    assert 0.95 < right(x, weight, bias) < 0.99
    support, values = top_k(x, weight, bias, K, "float8")
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, (x @ weight.T + bias)[support.token, support.index])


def test_columns_of_very_different_sizes_keep_their_precision() -> None:
    x, weight, bias = case()
    columns = torch.logspace(-2, 2, x.shape[1])
    assert right(x * columns, weight / columns, bias) > 0.94


def test_nan_is_left_to_be_found() -> None:
    for place in range(2):
        operands = case()
        operands[place][7, 2] = torch.nan
        _, values = top_k(operands[0], operands[1], operands[2], K, "float8")
        assert values.isnan().any()


@pytest.mark.parametrize(("by", "off"), [("bfloat16", 2**-7), ("float8", 0.25)])
def test_rows_in_bfloat16_keep_what_the_product_gives(by: Selection, off: float) -> None:
    """As under autocast: nothing is computed again, and values stay in single precision."""
    x, weight, bias = case()
    support, values = top_k(x.bfloat16(), weight, bias, K, by)
    pairs = support.token, support.index
    dtype = FLOAT8 if by == "float8" else torch.bfloat16
    product = torch.cat(list(by_chunks(x.bfloat16(), weight, bias, dtype, Tensor.clone)))
    assert values.dtype == torch.float32 and torch.equal(values, product[pairs].float())
    torch.testing.assert_close(values, (x @ weight.T + bias)[pairs], rtol=2**-7, atol=off)


@pytest.mark.parametrize(("capability", "expected"), [((8, 6), False), ((8, 9), True), ((9, 0), True)])
def test_older_gpus_do_as_a_cpu(capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    there: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    assert chunks._multiplies_float8(there) == expected
    assert not chunks._multiplies_float8(torch.zeros(1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_kernel_compiles_for_a_gpu(dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from hagd.transcoders.sparse.triton_float8 import _round_row

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {"rounded": "*fp8e4nv", "unit": "*fp32", "rows": f"*{dtype}"}
    stages = compiled(_round_row, pointers, ("d", "highest", "least"), 4, BLOCK=4096)
    assert "ld.global.v4" in stages["ptx"] and stages["cubin"]


@on_a_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_rounds_as_torch_does(dtype: torch.dtype) -> None:
    """The interpreter rounds some otherwise, and warns of what is not finite."""
    pytest.importorskip("triton")
    from hagd.transcoders.sparse import triton_float8

    rows = torch.randn(20, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 20)[:, None]
    rows[3], rows[4, 5] = 0, torch.nan
    if not INTERPRETED:
        rows[6, 1] = torch.inf
    found, unit = triton_float8.to_float8(rows.to(DEVICE, dtype))
    expected, wanted = to_float8(rows.to(dtype))
    torch.testing.assert_close(unit.cpu(), wanted, equal_nan=True)
    finite = torch.tensor([i not in (4, 6) for i in range(20)])
    here, there = found.cpu().float()[finite], expected.float()[finite]
    assert (here != there).float().mean() < (0.05 if INTERPRETED else 1e-9)
    if not INTERPRETED:
        assert found[4].float().isnan().all() and found[6, 1].float().isnan()
