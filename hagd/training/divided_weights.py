"""Processes that each hold a part of every weight (FSDP2) and checkpoint it."""

from __future__ import annotations

from typing import Any

from pytorch_lightning.strategies import ModelParallelStrategy
from torch.distributed.checkpoint.api import CheckpointException
from typing_extensions import override

from hagd.errors import ConfigError


class DividedWeightsStrategy(ModelParallelStrategy):
    """Lightning's own, which says what to do about a damaged checkpoint."""

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """What is not weights or optimiser state; those are restored in place.

        Raises:
            ConfigError: a part cannot be read; in every process, because torch tells all of them.
        """
        try:
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        except (Exception, CheckpointException) as error:  # a damaged file raises whatever its first bad byte leads to
            raise ConfigError(
                f"trainer.strategy=fsdp: expected a checkpoint that can be read, found {checkpoint_path}, which cannot "
                f"({_reason(error)}); if it is damaged, remove it to start over"
            ) from error


def _reason(error: BaseException) -> str:
    """An error in one line; the first one where processes told each other theirs."""
    if isinstance(error, CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
