"""Rows in float8 (e4m3) by a Triton kernel, which reads a row once.

Shape legend: r rows, d columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_FORMAT = torch.float8_e4m3fn


def to_float8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows `[r, d]` over what makes the largest entry of each the largest that the format holds, and that `[r, 1]`."""
    n_rows, d = rows.shape
    rounded = torch.empty(n_rows, d, dtype=_FORMAT, device=rows.device)
    unit = torch.empty(n_rows, 1, dtype=torch.float32, device=rows.device)
    least = torch.finfo(torch.float32).tiny
    with torch.cuda.device_of(rows):
        _round_row[(n_rows,)](
            rounded, unit, rows.contiguous(), d, torch.finfo(_FORMAT).max, least, BLOCK=triton.next_power_of_2(d)
        )
    return rounded, unit


@triton.jit  # type: ignore[untyped-decorator]
def _round_row(
    rounded: tl.tensor,
    unit: tl.tensor,
    rows: tl.tensor,
    d: tl.tensor,
    highest: tl.tensor,
    least: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    entry = tl.load(rows + row * d + column, mask=column < d, other=0.0).to(tl.float32)
    length = tl.maximum(tl.max(tl.abs(entry)) / highest, least)
    length = tl.where(tl.max((entry != entry).to(tl.int32)) > 0, float("nan"), length)  # which a maximum overlooks
    tl.store(unit + row, length)
    tl.store(rounded + row * d + column, (entry / length).to(rounded.dtype.element_ty), mask=column < d)
