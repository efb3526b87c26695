"""On which devices a model that exists already is put: what `model.device_map` names."""

from __future__ import annotations

import importlib.util

import torch

from hagd.errors import ModelError

_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")
"""Values of `model.device_map` that spread a model over all devices."""


def refuse_unusable(device_map: str | None) -> None:
    """To be asked before anything is done for a model.

    Raises:
        ModelError: it names no device, or one that is not here, or the package accelerate is missing.
    """
    first_device(device_map)
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            f"model.device_map={device_map}: needs the package accelerate, which is not installed; "
            "pip install 'hagd[gpu]', or set model.device_map=null"
        )


def first_device(device_map: str | None) -> torch.device:
    """The device that it names; of one that spreads a model, the first GPU where there is one.

    Raises:
        ModelError: it names no device, or one that PyTorch does not find.
    """
    _refuse_missing_gpu(device_map)
    if device_map in _SPREADING:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device_map or "cpu")
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", _accelerator()):
        raise ModelError(
            f"model.device_map={device_map}: expected a device, for example cuda:0, or one of {', '.join(_SPREADING)}; "
            "set it to one of these, or to null to compute on the CPU"
        )
    return device


def _accelerator() -> str:
    """What kind of device PyTorch finds beside the CPU."""
    found = torch.accelerator.current_accelerator()
    return "cpu" if found is None else found.type


def _refuse_missing_gpu(device_map: str | None) -> None:
    kind, _, index = (device_map or "").partition(":")
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if kind == "cuda" and int(index if index.isdigit() else 0) >= n_gpus:
        raise ModelError(
            f"model.device_map={device_map}: expected a GPU that PyTorch can use, found {n_gpus or 'none'}; "
            "set model.device_map=null to compute on the CPU"
        )
