"""Captured activations in files: safetensors with checksums, written whole or not at all."""

from __future__ import annotations

import logging
import os
import zlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

log = logging.getLogger(__name__)

_IDENTITY = "identity"


def write_part(path: Path, tensors: dict[str, Tensor], identity: str) -> None:
    """Write `tensors`, their CRC-32 and what they are to `path`.

    Raises:
        OSError: the disk is full or not writable; nothing is left of the file.
    """
    sums = {name: str(_checksum(tensor)) for name, tensor in tensors.items()}
    partial = path.with_name(f"{path.stem}.{os.getpid()}.partial")
    try:
        partial.write_bytes(save(tensors, {_IDENTITY: identity, **sums}))
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def clear_partials(folder: Path, prefix: str) -> None:
    """Delete what killed processes left of files whose names begin with `prefix`; some may be being written now."""
    for partial in folder.glob(f"{prefix}*.partial"):
        if not _alive(int(partial.name.split(".")[-2])):
            partial.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def read_part(path: Path, identity: str, check: bool = True) -> dict[str, Tensor] | None:
    """The tensors of a file, memory-mapped; None if there is none, it is damaged, or it holds something else.

    Args:
        path: of the file.
        identity: what it is to hold.
        check: compare the checksums, for which all of it is read.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            described = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        log.warning("%s cannot be read (%s); its activations are captured again", path, error)
        return None
    if described.get(_IDENTITY) != identity:
        log.warning("%s holds other activations; they are captured again", path)
        return None
    if check and any(described.get(name) != str(_checksum(tensor)) for name, tensor in tensors.items()):
        log.warning("%s is damaged; its activations are captured again", path)
        return None
    return tensors


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().data)
