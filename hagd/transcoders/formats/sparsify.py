"""The layout of sparsify (package eai-sparsify, 1.3): `<hookpoint>/cfg.json` and `<hookpoint>/sae.safetensors`.

A hookpoint is a module of the model without its head: `layers.5.mlp` (`h.5.mlp` in GPT-2) from input to output
(`transcode`), or `layers.5`, whose output is encoded and reconstructed. There the encoder reads `x − b_dec`, which is
folded into its bias here. Skips are `[out, in]`.

Shape legend: d = d_model, m dictionary size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from hagd.activations.capture import Site
from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats.checks import Layer, assemble, image, refusal
from hagd.transcoders.formats.files import Tensors, folders_with, new_folder, read_json, write_json, write_tensors
from hagd.transcoders.records import Transcoder, TranscoderSet

LAYOUT = "sparsify"
WEIGHTS = "sae.safetensors"
_SETTINGS = "cfg.json"
_RUN = "config.json"
_HOOKPOINT = re.compile(r"(?:.*\.)?(\d+)(?:\.(\w+))?")


def load(folder: Path) -> TranscoderSet:
    """The dictionaries in a folder of hookpoints, or of one hookpoint.

    Raises:
        ArtifactError: files are missing or damaged.
        ConfigError: they hold something else than TopK dictionaries of MLPs or of layer outputs.
    """
    folders = folders_with(folder, WEIGHTS)
    if not folders:
        raise ArtifactError(f"{folder}: expected subfolders with {WEIGHTS}, found none; give the folder above them")
    return assemble(folder, [_load_layer(each) for each in folders])


def _load_layer(folder: Path) -> Layer:
    settings = read_json(folder / _SETTINGS)
    layer, site = _parse(folder, bool(settings.get("transcode", False)))
    _check_settings(folder, settings, site)
    tensors = Tensors(folder / WEIGHTS)
    W_dec = tensors.take("W_dec", -1, -1)
    m, d = W_dec.shape
    W_enc = tensors.take("encoder.weight", m, d)
    b_enc, b_dec = tensors.take("encoder.bias", m), tensors.take("b_dec", d)
    if site == "resid":
        b_enc = b_enc.double() - image(W_enc, b_dec)
    skip = tensors.take("W_skip", d, d) if settings.get("skip_connection") else None
    k = settings.get("k")
    if not isinstance(k, int):
        raise ArtifactError(f"{folder / _SETTINGS}: expected k, the active features a token, found {k!r}; set it")
    transcoder = Transcoder(
        layer=layer,
        k=k,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        W_skip=None if skip is None else skip.T.contiguous(),
    )
    return Layer(folder, site, _model(folder.parent / _RUN), transcoder)


def _parse(folder: Path, transcode: bool) -> tuple[int, Site]:
    match = _HOOKPOINT.fullmatch(folder.name)
    expected = {"mlp": True, None: False}
    if match is None or expected.get(match[2]) is not transcode:
        raise ConfigError(
            f"{folder}: expected a hookpoint such as layers.5.mlp with transcode=true, or layers.5 with "
            f"transcode=false, found {folder.name} with transcode={str(transcode).lower()}; only dictionaries from an "
            "MLP's input to its output and autoencoders of a layer's output fit a site of HAGD"
        )
    return int(match[1]), "mlp" if transcode else "resid"


def _check_settings(folder: Path, settings: dict[str, Any], site: Site) -> None:
    activation = settings.get("activation", "topk")
    if activation != "topk" or settings.get("signed"):
        found = "signed features" if settings.get("signed") else f"activation={activation}"
        raise ConfigError(
            f"{folder / _SETTINGS}: expected activation=topk with features that are never negative, found {found}; "
            "train the dictionary with activation=topk"
        )
    if site == "resid" and settings.get("skip_connection"):
        raise ConfigError(
            f"{folder / _SETTINGS}: expected skip_connection=false for an autoencoder, found true; with a skip it "
            "copies its input and explains nothing"
        )


def _model(run: Path) -> str:
    """The model that a training run of sparsify's command line names beside its hookpoints."""
    return str(read_json(run).get("model") or "") if run.is_file() else ""


def save(found: TranscoderSet, folder: Path, layer_list: str = "layers") -> None:
    """Write TopK dictionaries, one hookpoint a layer.

    Args:
        found: the dictionaries.
        folder: new or empty.
        layer_list: name of the list of layers in the model without its head (`h` in GPT-2).

    Raises:
        ConfigError: they are not TopK, or cross-layer.
    """
    for each in found.transcoders:
        if each.k is None:
            raise refusal(
                LAYOUT, f"thresholds (layer {each.layer})", "TopK dictionaries", "train with transcoder.activation=topk"
            )
        if each.W_later:
            raise refusal(
                LAYOUT,
                f"features of layer {each.layer} that write to later layers",
                "dictionaries of one layer each",
                "use export.format=circuit_tracer or train with transcoder.cross_layer=false",
            )
    with new_folder(folder) as new:
        for each in found.transcoders:
            name = f"{layer_list}.{each.layer}" + (".mlp" if found.site == "mlp" else "")
            _save_layer(each, found.site, new / name)
        write_json(new / _RUN, {"model": found.model})


def _save_layer(found: Transcoder, site: Site, folder: Path) -> None:
    m, d = found.W_enc.shape
    folder.mkdir()
    settings = {
        "activation": "topk",
        "expansion_factor": max(m // d, 1),
        "normalize_decoder": False,
        "num_latents": m,
        "k": found.k,
        "multi_topk": False,
        "skip_connection": found.W_skip is not None,
        "transcode": site == "mlp",
        "d_in": d,
    }
    tensors: dict[str, Tensor | None] = {
        "encoder.weight": found.W_enc,
        # In double precision so that `load` finds every bit again; sparsify itself casts it to the decoder's.
        "encoder.bias": found.b_enc if site == "mlp" else found.b_enc.double() + image(found.W_enc, found.b_dec),
        "W_dec": found.W_dec,
        "b_dec": found.b_dec,
        "W_skip": None if found.W_skip is None else found.W_skip.T,
    }
    write_json(folder / _SETTINGS, settings)
    write_tensors(folder / WEIGHTS, tensors)
