"""Something else in the place of what a module computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Within: calling the module calls `forward` in place of its own, hooks included as before."""
    wrapped = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if wrapped is None:
            del module.forward
        else:
            module.forward = wrapped
