"""What is saved in a layout comes back with the same bits, whatever the layout can hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats import circuit_tracer, saelens, sparsify
from hagd.transcoders.records import TranscoderSet
from tests.transcoders.formats.layers import assert_same_bits, random_set

MODULES: dict[str, Any] = {"sparsify": sparsify, "saelens": saelens, "circuit_tracer": circuit_tracer}
HOLDS = {
    "sparsify": [
        {},
        {"skip": True},
        {"site": "resid"},
        {"layers": (2, 10, 11)},
        {"dtype": torch.bfloat16, "site": "resid"},
    ],
    "saelens": [
        {},
        {"site": "resid"},
        {"activation": "relu"},
        {"activation": "relu", "skip": True},
        {"activation": "jumprelu"},
        {"activation": "jumprelu", "skip": True},
        {"activation": "jumprelu", "site": "resid"},
        {"activation": "relu", "site": "resid"},
        {"layers": (2, 10, 11), "dtype": torch.bfloat16},
    ],
    "circuit_tracer": [
        {"activation": "relu"},
        {"activation": "relu", "skip": True},
        {"activation": "jumprelu"},
        {"activation": "jumprelu", "skip": True, "dtype": torch.bfloat16},
        {"activation": "relu", "cross_layer": True},
        {"activation": "jumprelu", "cross_layer": True},
    ],
}
CASES = [(layout, options) for layout, choices in HOLDS.items() for options in choices]


def named(value: object) -> str:
    return ", ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("layout", "options"), CASES, ids=named)
def test_same_bits(layout: str, options: dict[str, Any], tmp_path: Path) -> None:
    found = random_set(**options)
    MODULES[layout].save(found, tmp_path / "out")
    assert_same_bits(MODULES[layout].load(tmp_path / "out"), found)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


REFUSED = [
    ("sparsify", {"activation": "jumprelu"}, r"holds TopK dictionaries, found thresholds \(layer 0\); train with"),
    ("sparsify", {"cross_layer": True}, r"found features of layer 0 that write to later layers; use export\.format="),
    ("saelens", {"skip": True}, r"holds skips beside ReLU and JumpReLU only, found TopK with a skip \(layer 0\); use"),
    ("saelens", {"activation": "relu", "cross_layer": True}, "found features of layer 0 that write to later layers"),
    ("circuit_tracer", {}, r"holds ReLU and JumpReLU features, found TopK \(layer 0\); use export\.format=saelens"),
    ("circuit_tracer", {"activation": "relu", "site": "resid"}, r"transcoders of MLPs, found autoencoders .*resid"),
    ("circuit_tracer", {"activation": "relu", "layers": (1, 2)}, r"every layer from 0 up, found layers \[1, 2\]; use"),
    (
        "circuit_tracer",
        {"activation": "relu", "cross_layer": True, "skip": True},
        "no skip in its cross-layer files, found a cross-layer transcoder with a skip",
    ),
]


@pytest.mark.parametrize(("layout", "options", "message"), REFUSED)
def test_what_a_layout_cannot_hold_is_named(layout: str, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"^export\.format={layout}: its layout .*{message}"):
        MODULES[layout].save(random_set(**options), tmp_path / "out")
    assert not list(tmp_path.iterdir())


SAVE: dict[str, Callable[[TranscoderSet, Path], None]] = {name: module.save for name, module in MODULES.items()}


@pytest.mark.parametrize("layout", MODULES)
def test_a_folder_with_content_is_left_alone(layout: str, tmp_path: Path) -> None:
    found = random_set(activation="topk" if layout == "sparsify" else "relu")
    (tmp_path / "empty").mkdir()
    SAVE[layout](found, tmp_path / "empty")
    with pytest.raises(ConfigError, match=r"export\.path: expected a new or empty folder, found .*empty with content"):
        SAVE[layout](found, tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"export\.path: expected a new or empty folder"):
        SAVE[layout](found, tmp_path / "file")


@pytest.mark.parametrize("layout", MODULES)
def test_damage_is_named(layout: str, tmp_path: Path) -> None:
    SAVE[layout](random_set(activation="topk" if layout == "sparsify" else "relu"), tmp_path / "out")
    file = sorted((tmp_path / "out").rglob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=rf"{file.name}: expected a complete safetensors file, found damage"):
        MODULES[layout].load(tmp_path / "out")


@pytest.mark.parametrize("layout", MODULES)
def test_values_that_are_not_finite_are_refused(layout: str, tmp_path: Path) -> None:
    found = random_set(activation="topk" if layout == "sparsify" else "relu")
    found.transcoders[1].W_dec[3, 2] = float("nan")
    SAVE[layout](found, tmp_path / "out")
    with pytest.raises(ArtifactError, match="expected finite values, found NaN or infinity in W_dec"):
        MODULES[layout].load(tmp_path / "out")


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sparsify, "write_tensors", full)
    with pytest.raises(OSError, match="No space left"):
        sparsify.save(random_set(), tmp_path / "out")
    assert not list(tmp_path.iterdir())
