"""`comparison`: another extraction whose circuit is compared with that of this one."""

from __future__ import annotations

from pydantic import Field

from hagd.config.base import Section
from hagd.config.model import ModelConfig


class ComparisonConfig(Section):
    """Another model of the same task, extracted with the same other settings; the two circuits are compared."""

    model: ModelConfig
    seed_offset: int = Field(1, ge=0, description="seed of the other extraction = seed + seed_offset")
    n_null: int = Field(200, ge=1, description="pairs of random circuits that similarity is compared with")
    n_bootstrap: int = Field(200, ge=10, description="bootstrap resamples of the prompts")
