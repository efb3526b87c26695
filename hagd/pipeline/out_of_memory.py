"""A stage for which there is not enough memory ends with one line that names the keys that make it smaller."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hagd.errors import OutOfMemoryError

_SMALLER = {
    "lm": "task.training.batch_size or the model's sizes",
    "transcoders": "transcoder.batch_size, transcoder.expansion or transcoder.activations.memory_mb",
    "search": "graph.batch_size, search.gate_batch or graph.n_max",
    "validation": "validation.batch_size",
    "shift": "validation.batch_size",
    "dark_matter": "validation.batch_size",
}
"""Keys that decide what a stage holds, beside `_OTHERS`."""

_OTHERS = "graph.batch_size or transcoder.expansion"


@contextmanager
def explained_when_out_of_memory(stage: str) -> Iterator[None]:
    """What a stage does.

    Raises:
        OutOfMemoryError: an allocation failed, on a CPU or on a device.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_about_memory(error):
            raise
        said = str(error).strip().partition("\n")[0]
        raise OutOfMemoryError(
            f"{stage}: expected enough memory, found none left ({said}); lower {_SMALLER.get(stage, _OTHERS)}, or "
            "take a machine with more"
        ) from error


def _is_about_memory(error: BaseException) -> bool:
    """An error class of its own exists in torch for devices only."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "DefaultCPUAllocator" in str(error)
