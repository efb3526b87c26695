"""From a plain container (what Hydra composed) to a validated, frozen configuration."""

from __future__ import annotations

import json
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from hagd.config.base import Section
from hagd.config.problems import explain, sections_of
from hagd.errors import ConfigError

S = TypeVar("S", bound=Section)


def load_config(schema: type[S], container: dict[str, Any]) -> S:
    """Validate `container` against `schema`.

    Strict: no unknown keys, no coercion of text to numbers. Every problem is reported at once.

    Raises:
        ConfigError: one line a problem, each with key, expectation, what was found and the fix.
    """
    given = _without_unset(container)
    try:
        return schema.model_validate_json(json.dumps(given))
    except ValidationError as error:
        raise ConfigError(explain(schema, given, error.errors())) from None


def _without_unset(container: dict[str, Any]) -> dict[str, Any]:
    """Without Hydra's `???`, which stands for a key that must be set."""
    return {
        key: _without_unset(value) if isinstance(value, dict) else value
        for key, value in container.items()
        if value != "???"
    }


def field_names(schema: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Dotted name → description of every field below `schema` (unions contribute all their members)."""
    names: dict[str, str] = {}
    for name, field in schema.model_fields.items():
        names[prefix + name] = field.description or ""
        for section in sections_of(field.annotation):
            names |= field_names(section, f"{prefix}{name}.")
    return names
