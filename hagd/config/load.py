"""From a plain container (what Hydra composed) to a validated, frozen configuration."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel, ValidationError

from hagd.config.base import Section
from hagd.config.problems import explain, sections_of
from hagd.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

S = TypeVar("S", bound=Section)


def plain(composed: DictConfig) -> dict[str, Any]:
    """What Hydra composed as a plain container, its interpolations resolved.

    Raises:
        ConfigError: an interpolation cannot be resolved.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        container = OmegaConf.to_container(composed, resolve=True, throw_on_missing=False)
    except OmegaConfBaseException as error:
        why = str(error).partition("\n")[0]
        raise ConfigError(
            f"{error.full_key}: expected a value or the name of another key in ${{…}}, found: {why}; correct it"
        ) from None
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


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
