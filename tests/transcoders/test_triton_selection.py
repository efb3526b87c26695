"""The Triton top k against torch's.

Tests marked `gpu` run on a CUDA device, or in Triton's interpreter (`test_triton_interpreter.py`).
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch

from hagd.transcoders.sparse import top_of_rows as dispatch
from tests.transcoders.kernels import DEVICE, compiled, on_a_device
from tests.transcoders.rows import assert_largest, rows

pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@on_a_device
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (5, 5), (70, 7), (2048, 64), (4100, 64), (9000, 700)])
def test_top_of_rows_of_any_shape_is_that_of_torch(m: int, k: int, dtype: torch.dtype) -> None:
    from hagd.transcoders.sparse.triton_selection import top_of_rows

    pre = rows(m, dtype).to(DEVICE)
    assert_largest(*top_of_rows(pre, k), pre, k)


@on_a_device
def test_wide_rows_and_doubles_are_left_to_torch() -> None:
    from hagd.transcoders.sparse.triton_selection import can_hold

    assert can_hold(torch.empty(1, 2**17, device=DEVICE), 64)
    assert not can_hold(torch.empty(1, 2**20, device=DEVICE), 1000)
    assert not can_hold(torch.empty(1, 8, device=DEVICE, dtype=torch.float64), 4)


@pytest.mark.parametrize(("m", "k", "expected"), [(4096, 64, 1), (4100, 64, 8), (32768, 64, 16), (2**17, 128, 32)])
def test_about_as_many_groups_as_members_of_those_chosen(m: int, k: int, expected: int) -> None:
    from hagd.transcoders.sparse.triton_selection import group_size

    assert group_size(m, k) == expected


@pytest.mark.parametrize(
    ("dtype", "block"),
    [
        ("fp32", 2**11),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in (("bf16", 2**13), ("fp32", 2**13), ("bf16", 2**11))),
    ],
)
def test_the_kernels_compile_for_a_gpu_and_spill_nothing(
    dtype: str, block: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from triton import knobs

    from hagd.transcoders.sparse import triton_selection as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    bits, size = (32, 16) if dtype == "fp32" else (16, 16)
    integers, pre = {"ranks": f"*i{bits}"}, {"pre": f"*{dtype}"}
    row = {"values": f"*{dtype}", "columns": "*i64", **pre, "groups": "*i32"}
    warps = kernels.warps_of(block)
    each = [
        compiled(
            kernels._maxima, integers | pre, ("m", "n_groups"), 4, GROUPS=kernels._TILE // size, SIZE=size, BITS=bits
        ),
        compiled(kernels._top_of_ranks, {"groups": "*i32", **integers}, ("n", "k"), warps, BLOCK=block, BITS=bits),
        compiled(kernels._top_of_row, row, ("m", "n", "k"), warps, SIZE=size, BLOCK=block, BITS=bits),
    ]
    assert all("ld.global.v4" in stages["ptx"] for stages in each[:2])
    for stages in each:
        (tmp_path / "kernel.cubin").write_bytes(stages["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(tmp_path / "kernel.cubin")]
        used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert re.findall(r"(?:STACK|LOCAL):(\d+)", used) == ["0", "0"], used


def test_a_cpu_runs_numpy() -> None:
    assert dispatch.selection_kernels(torch.zeros(1, 8), 2) is None
