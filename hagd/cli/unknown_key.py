"""Hydra answers an unknown key with the advice to add it by `+`; this adds which key was probably meant."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hagd.config.base import Section

_REFUSED = re.compile(r"Could not override '(?P<key>[^']+)'")


@contextmanager
def nearest_key_named(schema: Callable[[], type[Section]]) -> Iterator[None]:
    """One line after Hydra's message when it ends the block because of an unknown key.

    Args:
        schema: gives the schema; called only then, because it takes a second to import.
    """
    try:
        yield
    except SystemExit as stop:  # Hydra exits while it handles its own exception
        if line := nearest_key(str(stop.__context__ or ""), schema):
            print(f"error: {line}", file=sys.stderr)
        raise


def nearest_key(said: str, schema: Callable[[], type[Section]]) -> str | None:
    """What to say to Hydra's message `said` about an unknown key; None when it is another one, or no key is near."""
    from hagd.config.load import field_names
    from hagd.config.problems import nearest

    refused = _REFUSED.match(said)
    if refused is None:
        return None
    key, known = refused["key"], field_names(schema())
    near = None if key in known else nearest(key, known)
    return f"{key}: expected a known key; did you mean {near}?" if near else None
