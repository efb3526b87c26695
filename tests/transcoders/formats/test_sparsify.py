"""sparsify's files as its own code writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats import sparsify
from tests.transcoders.formats.layers import D, K, M, assert_means, draw, random_set, slow_layer


def write(folder: Path, settings: dict[str, Any] | None = None, **tensors: Tensor | None) -> dict[str, Tensor]:
    """A hookpoint as `SparseCoder.save_to_disk` leaves it; a setting or tensor of None is left out."""
    folder.mkdir(parents=True)
    given = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": M,
        "k": K,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": folder.name.endswith("mlp"),
        "d_in": D,
        **(settings or {}),
    }
    (folder / "cfg.json").write_text(json.dumps({key: value for key, value in given.items() if value is not None}))
    stored = {
        "W_dec": draw(M, D, seed=1),
        "b_dec": draw(D, seed=2),
        "encoder.bias": draw(M, seed=3),
        "encoder.weight": draw(M, D, seed=4),
        **tensors,
    }
    kept = {name: tensor for name, tensor in stored.items() if tensor is not None}
    save_file(kept, folder / "sae.safetensors")
    return kept


def meaning(stored: dict[str, Tensor], x: Tensor, *, centred: bool) -> Any:
    return slow_layer(
        x,
        W_enc=stored["encoder.weight"],
        b_enc=stored["encoder.bias"],
        W_dec=stored["W_dec"],
        b_dec=stored["b_dec"],
        less=stored["b_dec"] if centred else None,
        k=K,
        W_skip=stored.get("W_skip"),
    )


def test_transcoder_with_a_skip(tmp_path: Path) -> None:
    stored = write(tmp_path / "layers.7.mlp", {"skip_connection": True}, W_skip=draw(D, D, seed=5))
    found = sparsify.load(tmp_path)
    assert (found.layers, found.site, found.model, found.transcoders[0].k) == ((7,), "mlp", "", K)
    x = draw(20, D)
    assert_means(found.transcoders[0], x, meaning(stored, x, centred=False))


def test_autoencoder_reads_its_input_less_the_decoder_bias(tmp_path: Path) -> None:
    stored = write(tmp_path / "layers.7")
    found = sparsify.load(tmp_path)
    assert (found.layers, found.site) == ((7,), "resid")
    x = draw(20, D)
    assert_means(found.transcoders[0], x, meaning(stored, x, centred=True))


def test_a_saved_autoencoder_means_the_same_there(tmp_path: Path) -> None:
    found = random_set(layers=(4,), site="resid").transcoders[0]
    sparsify.save(random_set(layers=(4,), site="resid"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "layers.4" / "sae.safetensors")
    x = draw(20, D)
    assert_means(found, x, meaning({name: t.float() for name, t in stored.items()}, x, centred=True))


def test_what_is_saved_is_what_sparsify_expects(tmp_path: Path) -> None:
    sparsify.save(random_set(layers=(4, 11), skip=True), tmp_path / "out", "h")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "h.11.mlp", "h.4.mlp"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model": "some-model"}
    settings = json.loads((tmp_path / "out" / "h.4.mlp" / "cfg.json").read_text())
    assert (settings["d_in"], settings["num_latents"], settings["k"]) == (D, M, K)
    assert settings["transcode"] and settings["skip_connection"] and not settings["normalize_decoder"]
    stored = load_file(tmp_path / "out" / "h.4.mlp" / "sae.safetensors")
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == {
        "encoder.weight": [M, D],
        "encoder.bias": [M],
        "W_dec": [M, D],
        "b_dec": [D],
        "W_skip": [D, D],
    }


def test_layers_ascend_by_number_and_the_run_names_the_model(tmp_path: Path) -> None:
    for layer in (10, 2, 0):
        write(tmp_path / f"gpt_neox.layers.{layer}.mlp")
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/pythia-160m", "batch_size": 32}))
    found = sparsify.load(tmp_path)
    assert (found.layers, found.model) == ((0, 2, 10), "EleutherAI/pythia-160m")
    assert sparsify.load(tmp_path / "gpt_neox.layers.2.mlp").layers == (2,)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    write(tmp_path / "layers.0", **{"encoder.weight": draw(M, D, dtype=torch.bfloat16)})
    (found,) = sparsify.load(tmp_path).transcoders
    assert {t.dtype for t in (found.W_enc, found.b_enc, found.W_dec, found.b_dec)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("layers.3.mlp", {"activation": "groupmax"}, "expected activation=topk .*, found activation=groupmax; train"),
        ("layers.3.mlp", {"signed": True}, "expected activation=topk with features .*, found signed features"),
        ("layers.3", {"skip_connection": True}, "skip_connection=false for an autoencoder, found true"),
        ("layers.3.mlp", {"transcode": False}, r"found layers\.3\.mlp with transcode=false; only dictionaries"),
        ("layers.3", {"transcode": True}, r"found layers\.3 with transcode=true"),
        ("layers.3.self_attn", {}, r"found layers\.3\.self_attn with transcode=false"),
        ("embed_tokens", {}, "found embed_tokens"),
    ],
)
def test_what_no_site_or_activation_fits_is_refused(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / name, settings)
    with pytest.raises(ConfigError, match=message):
        sparsify.load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "tensors", "message"),
    [
        ({"k": None}, {}, "expected k, the active features a token, found None"),
        ({"k": M + 1}, {}, f"expected k from 1 to the dictionary size {M}, found k = {M + 1}"),
        ({}, {"encoder.bias": None}, r"expected a tensor encoder\.bias, found W_dec, b_dec, encoder\.weight"),
        ({}, {"b_dec": draw(D + 1)}, rf"expected b_dec of shape \[{D}\], found \[{D + 1}\]"),
        ({"skip_connection": True}, {}, "expected a tensor W_skip"),
    ],
)
def test_incomplete_files_are_named(
    settings: dict[str, Any], tensors: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "layers.3.mlp", settings, **tensors)
    with pytest.raises(ArtifactError, match=message):
        sparsify.load(tmp_path)


def test_sets_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "mixed" / "layers.1.mlp")
    write(tmp_path / "mixed" / "layers.2")
    with pytest.raises(ConfigError, match=r"one site, found mlp in layers\.1\.mlp and resid in layers\.2; keep"):
        sparsify.load(tmp_path / "mixed")
    write(tmp_path / "twice" / "layers.1")
    write(tmp_path / "twice" / "model.layers.1")
    with pytest.raises(
        ArtifactError, match=r"one dictionary a layer, found layers\.1 and model\.layers\.1 for layer 1"
    ):
        sparsify.load(tmp_path / "twice")
    write(tmp_path / "sizes" / "layers.1")
    small = {"W_dec": draw(M - 1, D), "encoder.weight": draw(M - 1, D), "encoder.bias": draw(M - 1)}
    write(tmp_path / "sizes" / "layers.2", **small)
    with pytest.raises(ConfigError, match=rf"one shape \[m, d\], found \[{M}, {D}\] in layers\.1"):
        sparsify.load(tmp_path / "sizes")


def test_an_empty_folder_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected subfolders with sae\.safetensors, found none"):
        sparsify.load(tmp_path)
    write(tmp_path / "layers.1")
    (tmp_path / "layers.1" / "cfg.json").unlink()
    with pytest.raises(ArtifactError, match=r"cfg\.json: expected the description of a dictionary, found no such file"):
        sparsify.load(tmp_path)
    (tmp_path / "layers.1" / "cfg.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"cfg\.json: expected a readable description, found damage"):
        sparsify.load(tmp_path)
    (tmp_path / "layers.1" / "cfg.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"cfg\.json: expected named entries, found list"):
        sparsify.load(tmp_path)
