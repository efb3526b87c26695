"""One small file an architecture: it names the sites. Every module here with an `ADAPTER` is found by itself."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from hagd.models.adapter import Adapter


@cache
def all_adapters() -> tuple[Adapter, ...]:
    """The adapters of this package, in alphabetical order of their files."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return tuple(importlib.import_module(f"{__name__}.{name}").ADAPTER for name in names)
