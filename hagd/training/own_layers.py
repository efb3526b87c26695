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
            ConfigError: another number of processes wrote the checkpoint.
        """
        torch.cuda.empty_cache()
        file = Path(checkpoint_path) / self._name()
        if not file.is_file():
            written = sorted(path.name for path in Path(checkpoint_path).glob("*.ckpt"))
            raise ConfigError(
                f"trainer.devices: expected as many processes as wrote the checkpoint {checkpoint_path} ({written}), "
                f"found {self.world_size}; go on with as many, or remove that folder to start over"
            )
        return self.checkpoint_io.load_checkpoint(file, weights_only=weights_only)

    def _name(self) -> str:
        return f"process-{self.global_rank}-of-{self.world_size}.ckpt"
