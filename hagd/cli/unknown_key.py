"""Hydra answers a key that it cannot override with the advice to add it by `+`; this says what to do instead."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    from pydantic import BaseModel

    from hagd.config.base import Section

_REFUSED = re.compile(r"Could not override '(?P<key>[^']+)'")


@contextmanager
def unknown_keys_explained(schema: Callable[[], type[Section]]) -> Iterator[None]:
    """One line after Hydra's message when it ends the block because of a key that it cannot override.

    Args:
        schema: gives the schema; called only then, because it takes a second to import.
    """
    try:
        yield
    except SystemExit as stop:  # Hydra exits while it handles its own exception
        if line := key_advice(str(stop.__context__ or ""), schema):
            print(f"error: {line}", file=sys.stderr)
        raise


def key_advice(said: str, schema: Callable[[], type[Section]]) -> str | None:
    """What to say to Hydra's message `said` about a key; None when it is another one, or nothing is to be said."""
    refused = _REFUSED.match(said)
    if refused is None:
        return None
    from hagd.config.load import field_names
    from hagd.config.problems import nearest
    from hagd.config.run import ExtractConfig, TrainConfig

    key, known = refused["key"], field_names(schema())
    if key in known:
        return _not_chosen(key, schema())
    for entry, other in (("extract.py", ExtractConfig), ("train.py", TrainConfig)):
        if key in field_names(other):
            return f"{key}: a key of {entry} alone; run {entry} for it, or leave it out"
    near = nearest(key, known)
    return f"{key}: expected a known key; did you mean {near}?" if near else None


def _not_chosen(key: str, schema: type[Section]) -> str | None:
    """Why a key of the schema is not in a configuration: a section on its way is null, or another one."""
    from hagd.config.problems import sections_of

    sections: list[type[BaseModel]] = [schema]
    way, discriminator = "", None
    for part in key.split("."):
        holders = [section for section in sections if part in section.model_fields]
        if isinstance(discriminator, str) and len(holders) < len(sections):
            kinds = " or ".join(str(holder.model_fields[discriminator].default) for holder in holders)
            return f"{key}: needs {way}.{discriminator}={kinds}, found another; choose {way}=… with it, or leave it out"
        field = holders[0].model_fields[part]
        parent, way = way, f"{way}.{part}".lstrip(".")
        sections, discriminator = sections_of(field.annotation), field.discriminator
        if way != key and type(None) in get_args(field.annotation):
            rest = key.removeprefix(f"{way}.")
            fix = f"set it as a whole: '{way}={{{rest}: …}}'" if parent else f"choose {way}=… as well"
            return f"{key}: {way} is null; {fix}"
    return None
