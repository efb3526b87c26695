"""Processes that train different layers of one module: nothing is averaged, every process checkpoints its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import DDPStrategy
from typing_extensions import override

from hagd.errors import ConfigError


class OwnLayersStrategy(DDPStrategy):
    """Starts and connects processes as DDP does, and leaves their gradients alone."""

    @override
    def configure_ddp(self) -> None:
        pass

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        folder = Path(filepath)
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoint_io.save_checkpoint(checkpoint, folder / self._name(), storage_options=storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """This process's part.

        Raises:
            ConfigError: another number of processes wrote the checkpoint, or a part cannot be read; in every process,
                so that none waits for the one whose part it is.
        """
        torch.cuda.empty_cache()
        folder = Path(checkpoint_path)
        part, problem = self._part(folder, weights_only)
        problems: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(problems, problem)
        found = next(filter(None, problems), None)
        if found is not None:
            raise ConfigError(found)
        return part

    def _part(self, folder: Path, weights_only: bool | None) -> tuple[dict[str, Any], str | None]:
        """This process's part, empty after a problem, and the problem."""
        file = folder / self._name()
        if not file.is_file():
            written = sorted(path.name for path in folder.glob("*.ckpt"))
            return {}, (
                f"trainer.devices: expected as many processes as wrote the checkpoint {folder} ({written}), "
                f"found {self.world_size}; go on with as many, or remove that folder to start over"
            )
        try:
            return self.checkpoint_io.load_checkpoint(file, weights_only=weights_only), None
        except Exception as error:  # a damaged file raises whatever its first bad byte leads to
            return {}, (
                f"trainer.strategy=layers: expected a checkpoint that can be read, found {file}, which cannot "
                f"({type(error).__name__}: {error}); if it is damaged, remove {folder} to start over"
            )

    def _name(self) -> str:
        return f"process-{self.global_rank}-of-{self.world_size}.ckpt"
