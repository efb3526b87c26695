"""circuit-tracer's files as its own code writes and reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats import circuit_tracer
from tests.transcoders.formats.layers import D, M, assert_means, draw, random_set, slow_layer

THRESHOLD = "activation_function.threshold"


def configure(folder: Path, kind: str, **settings: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    given = {
        "model_name": "google/some-model",
        "model_kind": kind,
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "hook_mlp_out",
        "scan": "some/scan",
        **settings,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(given))


def layer_tensors(seed: int = 0) -> dict[str, Tensor]:
    return {
        "W_enc": draw(M, D, seed=seed + 1),
        "W_dec": draw(M, D, seed=seed + 2),
        "b_enc": draw(M, seed=seed + 3),
        "b_dec": draw(D, seed=seed + 4),
    }


def meaning(stored: dict[str, Tensor], x: Tensor) -> Any:
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    weights = {name: stored[name] for name in names}
    return slow_layer(x, **weights, threshold=stored.get(THRESHOLD), W_skip=stored.get("W_skip"))


@pytest.mark.parametrize(
    "extra",
    [{}, {"W_skip": draw(D, D, seed=9)}, {THRESHOLD: draw(M).abs()}, {THRESHOLD: draw(M).abs(), "W_skip": draw(D, D)}],
    ids=["relu", "skip", "jumprelu", "both"],
)
def test_a_set(extra: dict[str, Tensor], tmp_path: Path) -> None:
    configure(tmp_path, "transcoder_set")
    layers = [layer_tensors(10 * i) | extra for i in range(11)]
    for i, stored in enumerate(layers):
        save_file(stored, tmp_path / f"layer_{i}.safetensors")
    found = circuit_tracer.load(tmp_path)
    assert (found.layers, found.site, found.model) == (tuple(range(11)), "mlp", "google/some-model")
    x = draw(20, D)
    for i in (0, 2, 10):
        assert_means(found.transcoders[i], x, meaning(layers[i], x))


def test_a_set_whose_files_are_listed(tmp_path: Path) -> None:
    configure(tmp_path, "transcoder_set", transcoders=["deep/b.safetensors", "a.safetensors"])
    (tmp_path / "deep").mkdir()
    save_file(layer_tensors(1), tmp_path / "deep" / "b.safetensors")
    save_file(layer_tensors(2), tmp_path / "a.safetensors")
    found = circuit_tracer.load(tmp_path)
    assert torch.equal(found.transcoders[0].W_enc, layer_tensors(1)["W_enc"])
    assert torch.equal(found.transcoders[1].W_enc, layer_tensors(2)["W_enc"])


def write_cross_layer(folder: Path, n_layers: int, threshold: bool) -> list[dict[str, Tensor]]:
    configure(folder, "cross_layer_transcoder")
    layers = []
    for i in range(n_layers):
        stored = {name: tensor for name, tensor in layer_tensors(10 * i).items() if name != "W_dec"}
        if threshold:
            stored["threshold"] = draw(M, seed=i).abs()
        save_file({f"{name}_{i}": tensor for name, tensor in stored.items()}, folder / f"W_enc_{i}.safetensors")
        stored["W_dec"] = draw(M, n_layers - i, D, seed=i)
        save_file({f"W_dec_{i}": stored["W_dec"]}, folder / f"W_dec_{i}.safetensors")
        layers.append(stored)
    return layers


@pytest.mark.parametrize("threshold", [False, True])
def test_a_cross_layer_transcoder(threshold: bool, tmp_path: Path) -> None:
    layers = write_cross_layer(tmp_path, 3, threshold)
    found = circuit_tracer.load(tmp_path)
    x = draw(3, 20, D)
    features = [each.encode(row) for each, row in zip(found.transcoders, x, strict=True)]
    expected = np.stack([np.tile(stored["b_dec"].double().numpy(), (20, 1)) for stored in layers])
    for i, stored in enumerate(layers):
        own = {**stored, "W_dec": stored["W_dec"][:, 0]} | ({THRESHOLD: stored["threshold"]} if threshold else {})
        f, _ = meaning(own, x[i])
        np.testing.assert_allclose(features[i].numpy(), f, atol=1e-5)
        for place in range(3 - i):
            expected[i + place] += f @ stored["W_dec"][:, place].double().numpy()
    outputs = torch.stack([found.reconstruct(i, features, row) for i, row in enumerate(x)])
    np.testing.assert_allclose(outputs.numpy(), expected, rtol=1e-4, atol=1e-4)


def test_what_is_saved_is_what_circuit_tracer_expects(tmp_path: Path) -> None:
    found = random_set(activation="jumprelu", skip=True)
    circuit_tracer.save(found, tmp_path / "set")
    names = ["config.yaml", *(f"layer_{i}.safetensors" for i in range(3))]
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == names
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text()) == {
        "model_name": "some-model",
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    stored = load_file(tmp_path / "set" / "layer_1.safetensors")
    assert set(stored) == {"W_enc", "W_dec", "b_enc", "b_dec", THRESHOLD, "W_skip"}
    x = draw(20, D)
    assert_means(found.transcoders[1], x, meaning(stored, x))


def test_relu_has_no_thresholds_there(tmp_path: Path) -> None:
    circuit_tracer.save(random_set(activation="relu"), tmp_path / "set")
    assert set(load_file(tmp_path / "set" / "layer_0.safetensors")) == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_what_is_saved_of_a_cross_layer_transcoder(tmp_path: Path) -> None:
    found = random_set(activation="jumprelu", cross_layer=True)
    circuit_tracer.save(found, tmp_path / "clt")
    settings = yaml.safe_load((tmp_path / "clt" / "config.yaml").read_text())
    assert settings["model_kind"] == "cross_layer_transcoder"
    for i in range(3):
        encoder = load_file(tmp_path / "clt" / f"W_enc_{i}.safetensors")
        assert set(encoder) == {f"W_enc_{i}", f"b_enc_{i}", f"b_dec_{i}", f"threshold_{i}"}
        (decoders,) = load_file(tmp_path / "clt" / f"W_dec_{i}.safetensors").values()
        assert decoders.shape == (M, 3 - i, D) and torch.equal(decoders[:, 0], found.transcoders[i].W_dec)
    assert torch.equal(
        load_file(tmp_path / "clt" / "W_dec_0.safetensors")["W_dec_0"][:, 2], found.transcoders[0].W_later[1]
    )


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            "transcoder_set",
            {"feature_input_hook": "hook_resid_mid"},
            "found hook_resid_mid and hook_mlp_out; dictionar",
        ),
        ("transcoder_set", {"feature_input_hook": "ln2.hook_normalized"}, r"read mlp\.hook_in .*found ln2\.hook_norm"),
        ("transcoder_set", {"feature_output_hook": "hook_resid_post"}, "found mlp.hook_in and hook_resid_post"),
        ("lorsa", {}, "expected model_kind transcoder_set or cross_layer_transcoder, found lorsa"),
        (
            "transcoder_set",
            {"transcoders": ["hf://org/repo/a.safetensors"]},
            "expected transcoders to list .*found hf:",
        ),
    ],
)
def test_what_fits_no_site_or_is_elsewhere_is_refused(
    kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    configure(tmp_path, kind, **settings)
    save_file(layer_tensors(), tmp_path / "layer_0.safetensors")
    with pytest.raises(ConfigError, match=message):
        circuit_tracer.load(tmp_path)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    configure(tmp_path, "transcoder_set", transcoders=["a.npz"])
    (tmp_path / "a.npz").write_bytes(b"")
    with pytest.raises(
        ConfigError, match=r"expected transcoders to list safetensors files in this folder, found .*npz"
    ):
        circuit_tracer.load(tmp_path)


def test_gaps_negative_thresholds_and_missing_decoders_are_named(tmp_path: Path) -> None:
    configure(tmp_path / "gap", "transcoder_set")
    for i in (0, 2):
        save_file(layer_tensors(), tmp_path / "gap" / f"layer_{i}.safetensors")
    with pytest.raises(
        ArtifactError, match=r"expected layer_0\.safetensors and on without a gap, found numbers \[0, 2\]"
    ):
        circuit_tracer.load(tmp_path / "gap")
    configure(tmp_path / "low", "transcoder_set")
    save_file(layer_tensors() | {THRESHOLD: torch.full((M,), -0.5)}, tmp_path / "low" / "layer_0.safetensors")
    with pytest.raises(ArtifactError, match=r"expected thresholds of at least 0, found -0\.5"):
        circuit_tracer.load(tmp_path / "low")
    write_cross_layer(tmp_path / "clt", 3, threshold=False)
    (tmp_path / "clt" / "W_dec_1.safetensors").unlink()
    with pytest.raises(
        ArtifactError, match=r"W_dec_1\.safetensors: expected the tensors of a dictionary, found no such"
    ):
        circuit_tracer.load(tmp_path / "clt")
    write_cross_layer(tmp_path / "cut", 3, threshold=False)
    for name in ("W_enc_2", "W_dec_2"):
        (tmp_path / "cut" / f"{name}.safetensors").unlink()
    with pytest.raises(ArtifactError, match=rf"expected W_dec_0 of shape \[{M}, 2, {D}\], found \[{M}, 3, {D}\]"):
        circuit_tracer.load(tmp_path / "cut")
