from __future__ import annotations

import random
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hagd.activations.part_files import read_part, write_part


def tensors() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(2, 5, 3, generator=g).bfloat16(), "x_norm": torch.randn(2, 5, generator=g)}


@pytest.fixture
def part(tmp_path: Path) -> Path:
    write_part(tmp_path / "part.safetensors", tensors(), "these")
    return tmp_path / "part.safetensors"


def test_what_is_written_is_read(part: Path) -> None:
    found = read_part(part, "these")
    assert found is not None and found.keys() == tensors().keys()
    assert all(
        torch.equal(found[name], value) and found[name].dtype == value.dtype for name, value in tensors().items()
    )
    assert [file.name for file in part.parent.iterdir()] == ["part.safetensors"]


def test_no_file_and_another_files_content_are_nothing(part: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_part(part.with_name("none.safetensors"), "these") is None and not caplog.text
    assert read_part(part, "those") is None and "holds other activations" in caplog.text


def test_every_damage_is_noticed(part: Path) -> None:
    whole = part.read_bytes()
    draw = random.Random(0)
    for position in [0, 7, 8, 9, *draw.sample(range(len(whole)), 60), len(whole) - 1]:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << draw.randrange(8)
        part.write_bytes(damaged)
        found = read_part(part, "these")
        # A bit of the header may change nothing that is read, such as the name of metadata that nobody asks for.
        assert found is None or all(torch.equal(found[name], value) for name, value in tensors().items())
        assert found is None or position < len(whole) - 100
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        part.write_bytes(whole[:length])
        assert read_part(part, "these") is None


def test_a_disk_that_is_full_leaves_nothing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_part(tmp_path / "part.safetensors", tensors(), "these")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
