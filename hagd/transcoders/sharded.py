"""Training with every weight and its optimiser state divided over processes (FSDP2), for dictionaries that one device
cannot hold.

The feature dimension m of encoders, decoders and heads is cut into as many parts as there are processes. A layer's
weights are gathered for its part of a step, forwards and once more backwards, and its gradients are summed into the
parts right after; the other layers' stay divided meanwhile. Processes share the tokens of a batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from hagd.transcoders.dictionary import Dictionary
from hagd.transcoders.initialise import start
from hagd.transcoders.joint import JointTraining
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.prediction_head import PredictionHead


class ShardedTraining(JointTraining):
    """`TranscoderTraining` of this process's part of every weight."""

    def configure_model(self) -> None:
        """Build each layer, start it from data and keep this process's part, one after the other.

        Parts are on the trainer's device from then on; Lightning moves the rest of this module there afterwards.
        """
        mesh = init_device_mesh(self.trainer.strategy.root_device.type, (dist.get_world_size(),))
        power: list[torch.Tensor] = []

        def keep_part(layer: int, unit: Dictionary | PredictionHead) -> None:
            if isinstance(unit, Dictionary):
                x, y = self.start_tokens(range(layer, layer + 1))
                power.append(start(unit, x[0], y[0]))
            fully_shard(unit, mesh=mesh, reshard_after_forward=True)
            if isinstance(unit, PredictionHead):
                register_fsdp_forward_method(unit, "loss")

        self.stacked = self.stack(built=keep_part)
        self.stacked.power.copy_(torch.stack(power))
        fully_shard(self.stacked, mesh=mesh, reshard_after_forward=True)
        register_fsdp_forward_method(self.stacked, "losses")

    @torch.no_grad()
    def whole(self) -> StackedTranscoders:
        """The stack of all layers on the CPU, in every process; gathered weight by weight."""
        state = {}
        for name, value in self.stacked.state_dict().items():
            state[name] = (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        whole = self.stack()
        whole.load_state_dict(state)
        return whole
