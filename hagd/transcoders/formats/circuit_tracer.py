"""The layout of circuit-tracer (0.5): `config.yaml` beside one or two safetensors files a layer.

A `transcoder_set` has `layer_N.safetensors` with `W_enc`, `W_dec` `[m, d]`, `b_enc`, `b_dec`, and, where the features
are JumpReLU or there is a skip, `activation_function.threshold` and `W_skip` `[out, in]`. A `cross_layer_transcoder`
has `W_enc_N.safetensors` (encoder, both biases, thresholds) and `W_dec_N.safetensors` `[m, layers from N on, d]`.
Layers are all of 0 … L − 1.

Shape legend: d = d_model, m dictionary size, L layers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats.checks import Layer, assemble, is_relu, refusal
from hagd.transcoders.formats.files import Tensors, new_folder, read_yaml, write_tensors
from hagd.transcoders.records import Transcoder, TranscoderSet

LAYOUT = "circuit_tracer"
SETTINGS = "config.yaml"
_THRESHOLD = "activation_function.threshold"
_READS = ("mlp.hook_in",)
_WRITES = ("mlp.hook_out", "hook_mlp_out")
_SET, _CROSS_LAYER = "transcoder_set", "cross_layer_transcoder"


def load(folder: Path) -> TranscoderSet:
    """The dictionaries of a folder.

    Raises:
        ArtifactError: files are missing or damaged.
        ConfigError: the hooks are not an MLP's input and output, or the files are elsewhere.
    """
    file = folder / SETTINGS
    settings = read_yaml(file)
    reads, writes = settings.get("feature_input_hook"), settings.get("feature_output_hook")
    if reads not in _READS or writes not in _WRITES:
        raise ConfigError(
            f"{file}: expected features that read mlp.hook_in and write mlp.hook_out or hook_mlp_out, found {reads} "
            f"and {writes}; dictionaries that read before the norm of the MLP, or before its gain, fit no site of HAGD"
        )
    kind = settings.get("model_kind")
    if kind == _SET:
        layers = [(path, _read_layer(path, layer)) for layer, path in enumerate(_paths(folder, settings))]
    elif kind == _CROSS_LAYER:
        n_layers = len(_numbered(folder, "W_enc_"))
        layers = [(folder / f"W_enc_{i}.safetensors", _read_cross_layer(folder, i, n_layers)) for i in range(n_layers)]
    else:
        raise ConfigError(f"{file}: expected model_kind {_SET} or {_CROSS_LAYER}, found {kind}; correct it")
    model = str(settings.get("model_name") or "")
    return assemble(folder, [Layer(path, "mlp", model, transcoder) for path, transcoder in layers])


def _paths(folder: Path, settings: dict[str, Any]) -> list[Path]:
    """The file of each layer from 0 up."""
    listed = settings.get("transcoders")
    if listed is None:
        return _numbered(folder, "layer_")
    paths = [folder / str(path) for path in listed]
    absent = [str(path) for path, file in zip(listed, paths, strict=True) if not file.is_file()]
    if absent or any(file.suffix != ".safetensors" for file in paths):
        found = absent[0] if absent else next(str(file) for file in paths if file.suffix != ".safetensors")
        raise ConfigError(
            f"{folder / SETTINGS}: expected transcoders to list safetensors files in this folder, found {found}; "
            "download them with circuit-tracer's save_transcoders_to_cache and give the folder that it writes"
        )
    return paths


def _numbered(folder: Path, prefix: str) -> list[Path]:
    """The files `<prefix>0.safetensors` and on.

    Raises:
        ArtifactError: there are none, or numbers are missing.
    """
    numbers = sorted(
        int(match[1])
        for file in folder.glob(f"{prefix}*.safetensors")
        if (match := re.fullmatch(rf"{prefix}(\d+)", file.stem))
    )
    if numbers != list(range(len(numbers))) or not numbers:
        raise ArtifactError(
            f"{folder}: expected {prefix}0.safetensors and on without a gap, found numbers {numbers}; copy the "
            "missing files"
        )
    return [folder / f"{prefix}{number}.safetensors" for number in numbers]


def _read_layer(path: Path, layer: int) -> Transcoder:
    tensors = Tensors(path)
    W_dec = tensors.take("W_dec", -1, -1)
    m, d = W_dec.shape
    skip = tensors.take_if_there("W_skip", d, d)
    return Transcoder(
        layer=layer,
        k=None,
        W_enc=tensors.take("W_enc", m, d),
        b_enc=tensors.take("b_enc", m),
        W_dec=W_dec,
        b_dec=tensors.take("b_dec", d),
        threshold=_or_relu(tensors.take_if_there(_THRESHOLD, m), W_dec),
        W_skip=None if skip is None else skip.T.contiguous(),
    )


def _read_cross_layer(folder: Path, i: int, n_layers: int) -> Transcoder:
    encoder = Tensors(folder / f"W_enc_{i}.safetensors")
    W_enc = encoder.take(f"W_enc_{i}", -1, -1)
    m, d = W_enc.shape
    decoders = Tensors(folder / f"W_dec_{i}.safetensors").take(f"W_dec_{i}", m, n_layers - i, d)
    own, *later = (decoder.contiguous() for decoder in decoders.unbind(1))
    return Transcoder(
        layer=i,
        k=None,
        W_enc=W_enc,
        b_enc=encoder.take(f"b_enc_{i}", m),
        W_dec=own,
        b_dec=encoder.take(f"b_dec_{i}", d),
        threshold=_or_relu(encoder.take_if_there(f"threshold_{i}", m), W_enc),
        W_later=tuple(later),
    )


def _or_relu(threshold: Tensor | None, like: Tensor) -> Tensor:
    return like.new_zeros(len(like)) if threshold is None else threshold


def save(found: TranscoderSet, folder: Path) -> None:
    """Write a `transcoder_set`, or a `cross_layer_transcoder` where features write to later layers.

    Raises:
        ConfigError: autoencoders, TopK, layers with gaps, or a cross-layer transcoder with a skip.
    """
    _check(found)
    cross_layer = any(each.W_later for each in found.transcoders)
    settings = {
        "model_name": found.model,
        "model_kind": _CROSS_LAYER if cross_layer else _SET,
        "feature_input_hook": _READS[0],
        "feature_output_hook": _WRITES[0],
    }
    with new_folder(folder) as new:
        for each in found.transcoders:
            (_save_cross_layer if cross_layer else _save_layer)(each, new)
        (new / SETTINGS).write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")


def _check(found: TranscoderSet) -> None:
    if found.site != "mlp":
        raise refusal(
            LAYOUT,
            "autoencoders of the residual stream (site resid)",
            "transcoders of MLPs",
            "use export.format=saelens or sparsify, or train with transcoder.site=mlp",
        )
    if list(found.layers) != list(range(len(found.layers))):
        raise refusal(
            LAYOUT,
            f"layers {list(found.layers)}",
            "every layer from 0 up",
            "use export.format=saelens or sparsify, or train with transcoder.layers=null",
        )
    cross_layer = any(each.W_later for each in found.transcoders)
    for each in found.transcoders:
        if each.k is not None:
            raise refusal(
                LAYOUT,
                f"TopK (layer {each.layer})",
                "ReLU and JumpReLU features",
                "use export.format=saelens or sparsify, or train with another transcoder.activation",
            )
        if cross_layer and each.W_skip is not None:
            raise refusal(
                LAYOUT,
                f"a cross-layer transcoder with a skip (layer {each.layer})",
                "no skip in its cross-layer files",
                "train with transcoder.skip=false or transcoder.cross_layer=false",
            )


def _save_layer(found: Transcoder, folder: Path) -> None:
    tensors = {
        "W_enc": found.W_enc,
        "W_dec": found.W_dec,
        "b_enc": found.b_enc,
        "b_dec": found.b_dec,
        _THRESHOLD: _unless_relu(found),
        "W_skip": None if found.W_skip is None else found.W_skip.T,
    }
    write_tensors(folder / f"layer_{found.layer}.safetensors", tensors)


def _save_cross_layer(found: Transcoder, folder: Path) -> None:
    i = found.layer
    encoder = {
        f"W_enc_{i}": found.W_enc,
        f"b_enc_{i}": found.b_enc,
        f"b_dec_{i}": found.b_dec,
        f"threshold_{i}": _unless_relu(found),
    }
    write_tensors(folder / f"W_enc_{i}.safetensors", encoder)
    write_tensors(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": torch.stack((found.W_dec, *found.W_later), 1)})


def _unless_relu(found: Transcoder) -> Tensor | None:
    assert found.threshold is not None
    return None if is_relu(found.threshold) else found.threshold
