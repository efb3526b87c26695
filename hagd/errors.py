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


class ProcessEndedError(HagdError):
    """Another process of a training ended before it; names the stage and the checkpoint from which it continues."""


class OutOfMemoryError(HagdError):
    """A stage asked for more memory than there is; names the stage and the keys that make it smaller."""


class MemoryLimitError(HagdError):
    """A stage was stopped because it held more memory than the configuration allows.

    Attributes:
        peak_mb: what it held, in MB.
        limit_mb: what it may hold.
    """

    def __init__(self, message: str, peak_mb: float, limit_mb: float) -> None:
        super().__init__(message)
        self.peak_mb = peak_mb
        self.limit_mb = limit_mb
