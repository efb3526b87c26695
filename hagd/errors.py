"""Errors that a user can act on: the command line prints their message alone and exits non-zero."""

from __future__ import annotations


class HagdError(ValueError):
    """A problem whose message names the key or file, what was expected, what was found and the fix."""


class ConfigError(HagdError):
    """The configuration does not describe a run that can be made."""


class TaskError(HagdError):
    """A task cannot be built as configured (empty split, unequal lengths, vocabulary that does not fit)."""


class ModelError(HagdError):
    """A language model is missing, truncated, unreachable or of an unsupported architecture."""


class ArtifactError(HagdError):
    """A stored result is damaged, belongs to something else, or cannot be written."""


class NumericalError(HagdError):
    """A computation produced NaN or infinity; names the stage, step and layer."""
