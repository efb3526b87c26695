"""Dictionaries that were trained elsewhere, and copies of ours for other programs.

The layouts of peers are in `hagd.transcoders.formats`; HAGD's own is what the artifact store writes.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hagd.artifacts.codec import RECORD_FILE, load_record, save_record
from hagd.config.model import ModelConfig, PretrainedModel
from hagd.config.run import ExportConfig
from hagd.config.transcoder import TranscoderConfig
from hagd.errors import ConfigError
from hagd.models.language_model import LanguageModel
from hagd.models.records import ModelSample
from hagd.transcoders.formats import circuit_tracer, saelens, sparsify
from hagd.transcoders.formats.checks import in_precision
from hagd.transcoders.formats.files import folders_with, new_folder
from hagd.transcoders.loaded import contradictions
from hagd.transcoders.records import TranscoderSet

log = logging.getLogger(__name__)


def identity(path: str) -> dict[str, Any]:
    """What decides the dictionaries in a folder, without reading them: its files, their sizes and times.

    Raises:
        ConfigError: there is no such folder, or it has no known layout.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"transcoder.path: expected a folder with dictionaries, found {folder.absolute()}, which is none"
        )
    _layout(folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    listing = [(str(file.relative_to(folder)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return {"files": hashlib.sha256(repr(listing).encode()).hexdigest()}


def _layout(folder: Path) -> Callable[[Path], TranscoderSet]:
    """What reads the layout of a folder."""
    if (folder / RECORD_FILE).is_file():
        return lambda path: load_record(TranscoderSet, path)
    if (folder / circuit_tracer.SETTINGS).is_file():
        return circuit_tracer.load
    if folders_with(folder, saelens.WEIGHTS):
        return saelens.load
    if folders_with(folder, sparsify.WEIGHTS):
        return sparsify.load
    raise ConfigError(
        f"transcoder.path: expected {RECORD_FILE} (HAGD), {circuit_tracer.SETTINGS} (circuit-tracer), or subfolders "
        f"with {saelens.WEIGHTS} (SAELens) or {sparsify.WEIGHTS} (sparsify), found none of them in {folder.absolute()}"
    )


def read(path: str) -> TranscoderSet:
    """The dictionaries in a folder of any known layout, as they are there.

    Raises:
        ConfigError: the folder has no known layout, or something that ours cannot express.
        ArtifactError: files are missing or damaged.
    """
    folder = Path(path).expanduser()
    return _layout(folder)(folder)


def given(options: TranscoderConfig, model: ModelConfig, lm: LanguageModel) -> TranscoderSet:
    """The dictionaries of `transcoder.path` for a model: the configured layers, in single precision, not measured.

    Raises:
        ConfigError: they were trained for another model, site, width, precision or other layers, or are not what a
            setting of `transcoder` other than its default says; names both.
        ArtifactError: files are missing or damaged.
    """
    assert options.path is not None
    found = read(options.path)
    where = f"transcoder.path={options.path}: "
    _check_model(found, model, lm, where)
    if found.site != options.site:
        raise ConfigError(
            f"{where}expected dictionaries of site {options.site} (transcoder.site), found ones of site {found.site}; "
            f"set transcoder={found.site}"
        )
    _check_precision(found, lm, where)
    chosen = found.layers if options.layers is None else options.layers
    absent = sorted(set(chosen) - set(found.layers))
    if absent or chosen[-1] >= lm.n_layers:
        raise ConfigError(
            f"{where}expected dictionaries of layers {list(chosen)} for a model of {lm.n_layers} layers, found layers "
            f"{list(found.layers)}; set transcoder.layers to some of those below {lm.n_layers}"
        )
    if any(each.W_later for each in found.transcoders) and chosen != found.layers:
        raise ConfigError(
            f"{where}expected all layers {list(found.layers)} of a cross-layer transcoder, found transcoder.layers="
            f"{list(chosen)}; set transcoder.layers=null, because every layer reads from those before"
        )
    transcoders = tuple(in_precision(each, torch.float32) for each in found.transcoders if each.layer in chosen)
    if problems := contradictions(transcoders, options):
        raise ConfigError(
            f"{where}expected {'; '.join(problems)}; the files decide these settings: set them to what is expected or "
            "to their defaults, or train such dictionaries (transcoder.path=null)"
        )
    return TranscoderSet(lm.name, found.site, transcoders, trained_on=found.trained_on)


def sampled(model: ModelConfig, lm: LanguageModel) -> ModelSample | None:
    """What dictionaries record of the model that they are trained for; None where its weights are not at hand."""
    values = lm.weight_sample()
    return None if values is None else ModelSample(_hub_name(model), values)


def _hub_name(model: ModelConfig) -> str:
    """Where the hub has a model, with its revision; empty for a folder and other kinds."""
    if not isinstance(model, PretrainedModel) or Path(model.path).expanduser().is_dir():
        return ""
    return model.path if model.revision is None else f"{model.path}@{model.revision}"


def _check_model(found: TranscoderSet, model: ModelConfig, lm: LanguageModel, where: str) -> None:
    """The width and the weights must be the model's; the label only where dictionaries have recorded no weights."""
    origin = found.trained_on
    own = None if origin is None else sampled(model, lm)
    place = model.path if isinstance(model, PretrainedModel) else ""
    expected = f"{where}expected dictionaries trained for model {_named(lm.name, place)}"
    ones = f"found ones for {_named(found.model, origin.path if origin else '')}"
    if not found.model:
        log.warning("%sdoes not say for which model the dictionaries were trained; taking %s", where, lm.name)
    elif own is None and _short(found.model) not in {_short(name) for name in (lm.name, place or lm.name)}:
        raise ConfigError(
            f"{expected}, {ones}; choose that model, or set model.name={found.model} if it is the same under another "
            "name"
        )
    width = int(found.transcoders[0].W_enc.shape[1])
    if width != lm.d_model:
        raise ConfigError(
            f"{where}expected dictionaries for d_model = {lm.d_model} of model {lm.name}, found ones for {width}; "
            "choose the model that they were trained for"
        )
    if origin is not None and own is not None and not origin.fits(own.values):
        raise ConfigError(
            f"{expected}, {ones} with other weights; choose the model with the weights that they were trained for, or "
            "train dictionaries for this one (transcoder.path=null)"
        )


def _named(name: str, place: str) -> str:
    return f"{name} ({place})" if place else name


def _short(name: str) -> str:
    """`EleutherAI/pythia-70m` and `pythia-70m` are one model."""
    return name.rstrip("/").rpartition("/")[2].casefold()


def _check_precision(found: TranscoderSet, lm: LanguageModel, where: str) -> None:
    """Single precision serves any model; a lower one was trained with the rounding of a model in it."""
    own, models = found.transcoders[0].W_enc.dtype, lm.model.dtype
    if own not in (torch.float32, models):
        own_name, models_name = (str(dtype).removeprefix("torch.") for dtype in (own, models))
        raise ConfigError(
            f"{where}expected dictionaries in float32 or in {models_name} (model.dtype), found {own_name}; set "
            f"model.dtype={own_name}, or convert the files to float32"
        )


def export(found: TranscoderSet, options: ExportConfig, model: ModelConfig, lm: LanguageModel) -> None:
    """Write a copy of `found`, which then names the model as its hub does.

    Raises:
        ConfigError: the layout has no place for these dictionaries, or the folder has content.
    """
    assert options.path is not None
    folder = Path(options.path).expanduser()
    if options.format == "hagd":
        with new_folder(folder) as new:
            save_record(found, new)
        return
    if isinstance(model, PretrainedModel) and not Path(model.path).is_dir():
        found = replace(found, model=model.path)
    match options.format:
        case "sparsify":
            inside = lm.adapter.layers.removeprefix(f"{lm.adapter.backbone}.")
            sparsify.save(found, folder, inside)
        case "saelens":
            saelens.save(found, folder)
        case "circuit_tracer":
            circuit_tracer.save(found, folder)
