"""The layout of SAELens (6): a folder a layer with `cfg.json` and `sae_weights.safetensors`.

Encoders are `[d, m]`, skips `[out, in]`. Where `apply_b_dec_to_input` is set the encoder reads `x − b_dec`, and where
`rescale_acts_by_decoder_norm` is set TopK ranks features by what they write; both are folded into the weights here.

Shape legend: d = d_model, m dictionary size.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hagd.activations.capture import Site
from hagd.errors import ArtifactError, ConfigError
from hagd.transcoders.formats.checks import Layer, assemble, image, is_relu, refusal
from hagd.transcoders.formats.files import Tensors, folders_with, new_folder, read_json, write_json, write_tensors
from hagd.transcoders.records import Transcoder, TranscoderSet

LAYOUT = "saelens"
WEIGHTS = "sae_weights.safetensors"
_SETTINGS = "cfg.json"
_VERSION = "6.0.0"
"""The first version of SAELens that reads what is written here."""

_RELU = ("standard", "transcoder", "skip_transcoder")
_JUMPRELU = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_ARCHITECTURES = ("topk", "batchtopk", *_RELU, *_JUMPRELU)
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")
_PROCESSED = ("fold_ln", "center_writing_weights")


def load(folder: Path) -> TranscoderSet:
    """The dictionaries in a folder of layers, or of one layer.

    Raises:
        ArtifactError: files are missing or damaged.
        ConfigError: an architecture, activation normalisation or hook that this project's dictionaries cannot express.
    """
    folders = folders_with(folder, WEIGHTS)
    if not folders:
        raise ArtifactError(f"{folder}: expected subfolders with {WEIGHTS}, found none; give the folder above them")
    return assemble(folder, [_load_layer(each) for each in folders])


def _load_layer(folder: Path) -> Layer:
    file = folder / _SETTINGS
    settings = read_json(file)
    metadata = settings.get("metadata")
    if not isinstance(metadata, dict) or "hook_name" not in metadata:
        raise ConfigError(
            f"{file}: expected metadata.hook_name, as SAELens writes it since version 6, found none; load it with "
            "SAELens 6 and save it with save_model, or add the hook"
        )
    _check_settings(file, settings, metadata)
    layer, site = _parse(file, metadata)
    transcoder = _read(folder / WEIGHTS, settings, layer)
    return Layer(folder, site, str(metadata.get("model_name") or ""), transcoder)


def _check_settings(file: Path, settings: dict[str, Any], metadata: dict[str, Any]) -> None:
    architecture = settings.get("architecture")
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{file}: expected an architecture among {', '.join(_ARCHITECTURES)}, found {architecture}; "
            "save_inference_model turns some training architectures into one of these"
        )
    normalisation = settings.get("normalize_activations", "none")
    if normalisation != "none":
        raise ConfigError(
            f"{file}: expected normalize_activations=none, found {normalisation}; fold it into the weights before "
            "saving (fold_activation_norm_scaling_factor, fold_activation_whitening); normalisation by token cannot be"
        )
    if settings.get("reshape_activations", "none") != "none":
        raise ConfigError(
            f"{file}: expected reshape_activations=none, found {settings['reshape_activations']}; dictionaries of "
            "attention heads fit no site of HAGD"
        )
    processed = [key for key in _PROCESSED if (metadata.get("model_from_pretrained_kwargs") or {}).get(key)]
    if processed:
        raise ConfigError(
            f"{file}: expected a dictionary of the model's own activations, found one of a model loaded with "
            f"{' and '.join(processed)}; train it with from_pretrained_no_processing"
        )


def _parse(file: Path, metadata: dict[str, Any]) -> tuple[int, Site]:
    """Layer and site of the hooks that are read and written."""
    reads, writes = metadata["hook_name"], metadata.get("hook_name_out") or metadata["hook_name"]
    ends = [_HOOK.fullmatch(str(hook)) for hook in (reads, writes)]
    if ends[0] and ends[1] and ends[0][1] == ends[1][1]:
        layer = int(ends[0][1])
        match ends[0][2], ends[1][2]:
            case "mlp.hook_in", "mlp.hook_out" | "hook_mlp_out":
                return layer, "mlp"
            case "hook_resid_post", "hook_resid_post":
                return layer, "resid"
            case "hook_resid_pre", "hook_resid_pre" if layer > 0:
                return layer - 1, "resid"
    raise ConfigError(
        f"{file}: expected hooks from blocks.N.mlp.hook_in to blocks.N.mlp.hook_out, or blocks.N.hook_resid_post "
        f"alone, found {reads} to {writes}; what ln2.hook_normalized and hook_resid_mid give is not what enters an MLP"
    )


def _read(file: Path, settings: dict[str, Any], layer: int) -> Transcoder:
    architecture = settings["architecture"]
    tensors = Tensors(file)
    W_dec = tensors.take("W_dec", -1, -1)
    m, d = W_dec.shape
    W_enc = tensors.take("W_enc", d, m).T.contiguous()
    b_enc, b_dec = tensors.take("b_enc", m), tensors.take("b_dec", d)
    threshold = _threshold(tensors, architecture, m)
    if settings.get("apply_b_dec_to_input", True):
        b_enc = b_enc.double() - image(W_enc, b_dec)
    if settings.get("rescale_acts_by_decoder_norm"):
        length = W_dec.norm(dim=-1)
        W_enc, b_enc, W_dec = W_enc * length[:, None], b_enc * length, W_dec / length[:, None]
    skip = tensors.take("W_skip", d, d) if "skip" in architecture else None
    k = settings.get("k")
    if architecture == "topk" and not isinstance(k, int):
        raise ArtifactError(f"{file.parent / _SETTINGS}: expected k, the active features a token, found {k!r}; set it")
    return Transcoder(
        layer=layer,
        k=k if architecture == "topk" else None,
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        threshold=threshold,
        W_skip=None if skip is None else skip.T.contiguous(),
    )


def _threshold(tensors: Tensors, architecture: str, m: int) -> Tensor | None:
    """`[m]`, or None for TopK. SAELens clips features at 0, so a threshold below is one of 0."""
    if architecture == "topk":
        return None
    if architecture in _RELU:
        return torch.zeros(m)
    if architecture == "batchtopk":  # a training checkpoint; SAELens infers with one threshold too
        return tensors.take("topk_threshold").expand(m).clone()
    return tensors.take("threshold", m).clamp(min=0)


def save(found: TranscoderSet, folder: Path) -> None:
    """Write one folder a layer, named by its hook.

    TopK dictionaries of MLPs become the architecture `topk` with an output hook, the only one of SAELens with TopK.

    Raises:
        ConfigError: they are cross-layer, or TopK with a skip.
    """
    for each in found.transcoders:
        if each.W_later:
            raise refusal(
                LAYOUT,
                f"features of layer {each.layer} that write to later layers",
                "dictionaries of one layer each",
                "use export.format=circuit_tracer or train with transcoder.cross_layer=false",
            )
        if each.k is not None and each.W_skip is not None:
            raise refusal(
                LAYOUT,
                f"TopK with a skip (layer {each.layer})",
                "skips beside ReLU and JumpReLU only",
                "use export.format=sparsify, or train with transcoder.skip=false or another transcoder.activation",
            )
    with new_folder(folder) as new:
        for each in found.transcoders:
            _save_layer(each, found, new)


def _save_layer(found: Transcoder, whole: TranscoderSet, folder: Path) -> None:
    m, d = found.W_enc.shape
    block = f"blocks.{found.layer}"
    mlp = whole.site == "mlp"
    hooks = {"hook_name": f"{block}.mlp.hook_in", "hook_name_out": f"{block}.mlp.hook_out"}
    if not mlp:
        hooks = {"hook_name": f"{block}.hook_resid_post"}
    architecture = _architecture(found, mlp)
    settings = {
        "architecture": architecture,
        "d_in": d,
        "d_sae": m,
        **({"d_out": d} if "transcoder" in architecture else {}),
        **({"k": found.k, "rescale_acts_by_decoder_norm": False} if found.k is not None else {}),
        "dtype": str(found.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": _VERSION, "model_name": whole.model, **hooks},
    }
    own = folder / hooks["hook_name"]
    own.mkdir()
    write_json(own / _SETTINGS, settings)
    write_tensors(
        own / WEIGHTS,
        {
            "W_enc": found.W_enc.T,
            "b_enc": found.b_enc,
            "W_dec": found.W_dec,
            "b_dec": found.b_dec,
            "threshold": found.threshold if architecture in _JUMPRELU else None,
            "W_skip": None if found.W_skip is None else found.W_skip.T,
        },
    )


def _architecture(found: Transcoder, mlp: bool) -> str:
    if found.threshold is None:
        return "topk"
    relu = is_relu(found.threshold)
    if not mlp:
        return "standard" if relu else "jumprelu"
    name = "skip_transcoder" if found.W_skip is not None else "transcoder"
    return name if relu else f"jumprelu_{name}"
