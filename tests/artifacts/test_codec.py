from __future__ import annotations

import json
import math
from dataclasses import dataclass, make_dataclass
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hagd.artifacts.codec import DamagedArtifactError, load_record, save_record
from hagd.errors import ArtifactError
from hagd.tasks.records import Prompts, TaskData


@dataclass(frozen=True)
class Leaf:
    weight: Tensor
    name: str = "leaf"


@dataclass(frozen=True)
class Newer:
    weight: float
    name: str = "leaf"
    since: str | None = None


@dataclass(frozen=True)
class Tree:
    value: Any
    leaves: tuple[Leaf, ...] = ()
    by_name: dict[str, Leaf | None] | None = None


def round_trip(record: Any) -> Any:
    with TemporaryDirectory() as folder:
        save_record(record, Path(folder))
        return load_record(type(record), Path(folder))


def bits(tensor: Tensor) -> Tensor:
    plain = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)  # ordinary strides
    return plain.reshape(-1).view(torch.uint8)


def same(a: Any, b: Any) -> bool:
    """Equal in type, structure and every bit."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.numel() == 0 or torch.equal(bits(a), bits(b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, Leaf | Tree | Prompts | TaskData):
        return same(vars(a), vars(b))
    return bool(a == b)


DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.bool, torch.uint8)
SHAPES = st.lists(st.integers(0, 3), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype = draw(SHAPES), draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    raw = torch.randint(0, 256, (*shape, 8), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        return raw[..., 0] > 127
    return raw[..., : dtype.itemsize].contiguous().view(dtype).squeeze(-1)  # every bit pattern, NaN payloads too


ARRAYS = tensors().filter(lambda tensor: tensor.dtype is not torch.bfloat16).map(lambda tensor: tensor.numpy())
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
VALUES = st.recursive(
    SCALARS | tensors() | ARRAYS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
LEAVES = st.builds(Leaf, weight=tensors(), name=st.text())
TREES = st.builds(
    Tree,
    value=VALUES,
    leaves=st.lists(LEAVES, max_size=2).map(tuple),
    by_name=st.none() | st.dictionaries(st.text(max_size=5), st.none() | LEAVES, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(record=TREES)
def test_round_trip_is_bitwise(record: Tree) -> None:
    assert same(record, round_trip(record))


def test_round_trip_of_a_task() -> None:
    def prompts(n: int, labels: bool) -> Prompts:
        tokens = torch.arange(n * 6).reshape(n, 1, 6)
        target = tokens[:, 0] if labels else None
        return Prompts(tokens, tokens + 1, tokens * 0, tokens[..., :1], tokens[..., None], tokens[..., None], target)

    task = TaskData(
        "parity",
        ("bit1", "="),
        "argmax",
        False,
        0.5,
        ("0", "1"),
        None,
        prompts(4, True),
        prompts(0, False),
        prompts(1, True),
    )
    assert same(task, round_trip(task))


def test_views_shared_and_strided_tensors() -> None:
    base = torch.arange(12.0, requires_grad=True).reshape(3, 4)
    views = [base, base.T, base[:, 1], base[0], base.expand(2, 3, 4)]
    loaded = round_trip(Tree(views)).value
    assert all(torch.equal(a, b) and not b.requires_grad for a, b in zip(views, loaded, strict=True))


def test_small_view_does_not_store_its_whole_base(tmp_path: Path) -> None:
    save_record(Tree(torch.zeros(1_000_000)[:3]), tmp_path)
    assert (tmp_path / "tensors.safetensors").stat().st_size < 1000


def test_names_that_meet_stay_apart() -> None:
    value = {"a.b": torch.tensor(1), "a": {"b": torch.tensor(2)}}
    assert same(value, round_trip(Tree(value)).value)


def test_numpy_scalars_become_python_numbers() -> None:
    assert same([1.5, 3, True], round_trip(Tree([np.float64(1.5), np.int32(3), np.bool_(True)])).value)


class Colour(StrEnum):
    RED = "red"


@pytest.mark.parametrize(
    "value",
    [
        {"deep": [object()]},
        {"deep": [np.array(["text"])]},
        {"deep": [Path("x")]},
        {"deep": [torch.eye(2).to_sparse()]},
        {"deep": [torch.zeros(2, dtype=torch.complex128)]},
        {"deep": [Colour.RED]},
        {"deep": [{1: 2}]},
    ],
)
def test_unstorable_values_are_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"value\.deep\.0.*found"):
        save_record(Tree(value), tmp_path)


def saved(folder: Path) -> Path:
    save_record(Tree([1.25, "text"], leaves=(Leaf(torch.arange(64.0)),)), folder)
    return folder


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    for name in ("record.json", "tensors.safetensors"):
        whole = (saved(tmp_path) / name).read_bytes()
        for size in range(len(whole)):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(DamagedArtifactError, match="delete this folder and run again"):
                load_record(Tree, tmp_path)


def test_flipped_bits_are_noticed(tmp_path: Path) -> None:
    content = (saved(tmp_path) / "record.json").read_text()
    (tmp_path / "record.json").write_text(content.replace("1.25", "1.75"))
    with pytest.raises(DamagedArtifactError, match="checksum"):
        load_record(Tree, tmp_path)
    whole = bytearray((saved(tmp_path) / "tensors.safetensors").read_bytes())
    whole[-3] ^= 1
    (tmp_path / "tensors.safetensors").write_bytes(whole)
    with pytest.raises(DamagedArtifactError, match=r"tensors\.safetensors does not match"):
        load_record(Tree, tmp_path)


@pytest.mark.parametrize("name", ["record.json", "tensors.safetensors"])
def test_missing_file_is_named(name: str, tmp_path: Path) -> None:
    (saved(tmp_path) / name).unlink()
    with pytest.raises(DamagedArtifactError, match=name):
        load_record(Tree, tmp_path)


def test_another_record_and_another_version(tmp_path: Path) -> None:
    with pytest.raises(DamagedArtifactError, match="expected a Leaf, found a Tree"):
        load_record(Leaf, saved(tmp_path))
    stored = json.loads((tmp_path / "record.json").read_text())
    (tmp_path / "record.json").write_text(json.dumps({**stored, "format": 99}))
    with pytest.raises(DamagedArtifactError, match="expected format 1, found 99"):
        load_record(Tree, tmp_path)


def test_changed_fields_are_noticed(tmp_path: Path) -> None:
    old = dataclass(frozen=True)(type("Leaf", (), {"__annotations__": {"weight": int}}))
    save_record(old(weight=1), tmp_path)
    with pytest.raises(DamagedArtifactError, match="expected the fields"):
        load_record(Leaf, tmp_path)


def test_a_field_that_older_files_lack_is_none_where_it_may_be(tmp_path: Path) -> None:
    def written(**fields: Any) -> Any:
        return make_dataclass("Newer", fields, frozen=True)(**fields)

    save_record(written(weight=1.0, name="old"), tmp_path / "old")
    assert load_record(Newer, tmp_path / "old") == Newer(weight=1.0, name="old", since=None)
    save_record(written(weight=1.0, name="old", until=2.0), tmp_path / "unknown")
    save_record(written(name="old", since="then"), tmp_path / "short")
    for folder in ("unknown", "short"):
        with pytest.raises(DamagedArtifactError, match="expected the fields"):
            load_record(Newer, tmp_path / folder)
