"""SAELens' files as its own code writes and reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hagd.activations.capture import Site
from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats import saelens
from tests.transcoders.formats.layers import Activation, D, K, M, assert_means, draw, random_set, slow_layer

RESID = {"hook_name": "blocks.5.hook_resid_post"}
MLP = {"hook_name": "blocks.5.mlp.hook_in", "hook_name_out": "blocks.5.mlp.hook_out"}


def write(folder: Path, settings: dict[str, Any], metadata: dict[str, Any], **tensors: Tensor) -> dict[str, Tensor]:
    """A folder as `SAE.save_model` leaves it."""
    folder.mkdir(parents=True)
    given = {
        "d_in": D,
        "d_sae": M,
        "dtype": "float32",
        "device": "cpu",
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "gpt2-small", **metadata},
        **settings,
    }
    (folder / "cfg.json").write_text(json.dumps(given))
    stored = {
        "W_enc": draw(D, M, seed=1),
        "b_enc": draw(M, seed=2),
        "W_dec": draw(M, D, seed=3),
        "b_dec": draw(D, seed=4),
        **tensors,
    }
    save_file(stored, folder / "sae_weights.safetensors")
    return stored


def meaning(stored: dict[str, Tensor], x: Tensor, *, centred: bool, k: int | None = None) -> Any:
    return slow_layer(
        x,
        W_enc=stored["W_enc"].T,
        b_enc=stored["b_enc"],
        W_dec=stored["W_dec"],
        b_dec=stored["b_dec"],
        less=stored["b_dec"] if centred else None,
        k=k,
        threshold=stored.get("threshold"),
        W_skip=stored.get("W_skip"),
    )


THRESHOLD = {"threshold": draw(M, seed=5) + 0.3}
"""Some are negative: SAELens clips features at 0 there."""

SKIP = {"W_skip": draw(D, D, seed=6)}


@pytest.mark.parametrize(
    ("architecture", "tensors"),
    [
        ("standard", {}),
        ("jumprelu", THRESHOLD),
        ("transcoder", {}),
        ("skip_transcoder", SKIP),
        ("jumprelu_transcoder", THRESHOLD),
        ("jumprelu_skip_transcoder", THRESHOLD | SKIP),
    ],
)
def test_architectures_with_thresholds(architecture: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    mlp = "transcoder" in architecture
    settings = {"architecture": architecture, "apply_b_dec_to_input": not mlp}
    stored = write(tmp_path / "any name", settings, MLP if mlp else RESID, **tensors)
    found = saelens.load(tmp_path)
    assert (found.layers, found.site, found.model) == ((5,), "mlp" if mlp else "resid", "gpt2-small")
    x = draw(20, D)
    assert_means(found.transcoders[0], x, meaning(stored, x, centred=not mlp))


@pytest.mark.parametrize("centred", [True, False])
def test_topk_with_and_without_the_decoder_bias_at_its_input(centred: bool, tmp_path: Path) -> None:
    stored = write(tmp_path / "l", {"architecture": "topk", "k": K, "apply_b_dec_to_input": centred}, RESID)
    x = draw(20, D)
    assert_means(saelens.load(tmp_path).transcoders[0], x, meaning(stored, x, centred=centred, k=K))


def test_subtracting_the_decoder_bias_is_their_default(tmp_path: Path) -> None:
    stored = write(tmp_path / "l", {"architecture": "topk", "k": K}, RESID)
    x = draw(20, D)
    assert_means(saelens.load(tmp_path).transcoders[0], x, meaning(stored, x, centred=True, k=K))


def test_topk_that_ranks_by_what_features_write(tmp_path: Path) -> None:
    settings = {"architecture": "topk", "k": K, "rescale_acts_by_decoder_norm": True}
    stored = write(tmp_path / "l", settings, RESID)
    length = stored["W_dec"].norm(dim=-1)
    scaled = {
        **stored,
        "W_enc": stored["W_enc"] * length,
        "b_enc": stored["b_enc"] * length,
        "W_dec": stored["W_dec"] / length[:, None],
    }
    x = draw(20, D)
    assert_means(saelens.load(tmp_path).transcoders[0], x, meaning(scaled, x, centred=True, k=K))


def test_a_checkpoint_of_batchtopk_infers_with_its_one_threshold(tmp_path: Path) -> None:
    threshold = torch.tensor(0.7, dtype=torch.float64)
    settings = {"architecture": "batchtopk", "k": 3.5, "apply_b_dec_to_input": False}
    stored = write(tmp_path / "l", settings, RESID, topk_threshold=threshold)
    (found,) = saelens.load(tmp_path).transcoders
    assert found.k is None and found.threshold is not None and found.threshold.dtype == torch.float32
    x = draw(20, D)
    expected = meaning({**stored, "threshold": torch.full((M,), 0.7)}, x, centred=False)
    assert_means(found, x, expected)


def test_what_enters_a_layer_is_what_leaves_the_one_before(tmp_path: Path) -> None:
    write(tmp_path / "l", {"architecture": "standard"}, {"hook_name": "blocks.5.hook_resid_pre"})
    assert saelens.load(tmp_path).layers == (4,)


WRITTEN: list[tuple[Site, Activation, bool, str]] = [
    ("resid", "topk", False, "topk"),
    ("resid", "jumprelu", False, "jumprelu"),
    ("resid", "relu", False, "standard"),
    ("mlp", "topk", False, "topk"),
    ("mlp", "relu", False, "transcoder"),
    ("mlp", "relu", True, "skip_transcoder"),
    ("mlp", "jumprelu", False, "jumprelu_transcoder"),
    ("mlp", "jumprelu", True, "jumprelu_skip_transcoder"),
]


@pytest.mark.parametrize(("site", "activation", "skip", "architecture"), WRITTEN)
def test_what_is_saved_is_what_saelens_expects(
    site: Site, activation: Activation, skip: bool, architecture: str, tmp_path: Path
) -> None:
    found = random_set(layers=(5,), site=site, activation=activation, skip=skip)
    saelens.save(found, tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    settings = json.loads((folder / "cfg.json").read_text())
    hooks = RESID if site == "resid" else MLP
    assert folder.name == hooks["hook_name"]
    assert settings["metadata"] == {"sae_lens_version": "6.0.0", "model_name": "some-model", **hooks}
    assert (settings["architecture"], settings.get("k")) == (architecture, K if activation == "topk" else None)
    assert (settings["apply_b_dec_to_input"], settings["dtype"]) == (False, "float32")
    assert settings.get("d_out") == (D if "transcoder" in architecture else None)
    stored = load_file(folder / "sae_weights.safetensors")
    names = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"W_skip"} if skip else set())
    assert set(stored) == names | ({"threshold"} if activation == "jumprelu" else set())
    x = draw(20, D)
    assert_means(found.transcoders[0], x, meaning(stored, x, centred=False, k=settings.get("k")))


@pytest.mark.parametrize(
    ("settings", "metadata", "message"),
    [
        ({"architecture": "gated"}, RESID, "expected an architecture among topk, .*, found gated"),
        ({"normalize_activations": "layer_norm"}, RESID, "expected normalize_activations=none, found layer_norm; fold"),
        ({"normalize_activations": "expected_average_only_in"}, RESID, "found expected_average_only_in; fold"),
        ({"reshape_activations": "hook_z"}, RESID, "expected reshape_activations=none, found hook_z"),
        ({}, {"hook_name": "blocks.5.hook_mlp_out"}, r"found blocks\.5\.hook_mlp_out to blocks\.5\.hook_mlp_out"),
        ({}, {"hook_name": "blocks.0.hook_resid_pre"}, r"expected hooks from blocks\.N\.mlp\.hook_in"),
        (
            {},
            {"hook_name": "blocks.5.ln2.hook_normalized", "hook_name_out": "blocks.5.hook_mlp_out"},
            r"found blocks\.5\.ln2\.hook_normalized to blocks\.5\.hook_mlp_out; what ln2\.hook_normalized",
        ),
        (
            {},
            {"hook_name": "blocks.5.mlp.hook_in", "hook_name_out": "blocks.6.mlp.hook_out"},
            r"found blocks\.5\.mlp\.hook_in to blocks\.6\.mlp\.hook_out",
        ),
        (
            {},
            {**RESID, "model_from_pretrained_kwargs": {"center_writing_weights": True, "fold_ln": False}},
            "found one of a model loaded with center_writing_weights; train it with from_pretrained_no_processing",
        ),
    ],
)
def test_what_cannot_be_expressed_is_refused(
    settings: dict[str, Any], metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "l", {"architecture": "standard", **settings}, metadata)
    with pytest.raises(ConfigError, match=message):
        saelens.load(tmp_path)


def test_files_from_before_version_6_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "l", {"architecture": "standard", "metadata": None, "hook_name": "blocks.5.hook_resid_pre"}, {})
    with pytest.raises(ConfigError, match=r"expected metadata\.hook_name, as SAELens writes it since version 6"):
        saelens.load(tmp_path)


def test_other_widths_and_missing_k_are_named(tmp_path: Path) -> None:
    write(tmp_path / "a" / "l", {"architecture": "transcoder"}, MLP, W_enc=draw(D + 2, M))
    with pytest.raises(ArtifactError, match=rf"expected W_enc of shape \[{D}, {M}\], found \[{D + 2}, {M}\]"):
        saelens.load(tmp_path / "a")
    write(tmp_path / "b" / "l", {"architecture": "topk"}, RESID)
    with pytest.raises(ArtifactError, match=r"cfg\.json: expected k, the active features a token, found None"):
        saelens.load(tmp_path / "b")
    with pytest.raises(ArtifactError, match=r"expected subfolders with sae_weights\.safetensors, found none"):
        saelens.load(tmp_path)
