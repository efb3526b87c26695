"""Base of every config section: frozen, no unknown keys, no silent coercion between types, no infinity."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """One section of the configuration. Field descriptions are the user documentation (`docs/config.md`)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())
