"""Training with the layers divided over processes: each owns the dictionaries of consecutive layers.

Neighbours exchange what the prediction head between their layers needs: k features a token and what they write
forward, one derivative of each back. Shape legend: B tokens, n active pairs, d = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hagd.errors import ConfigError
from hagd.training.loss_watch import BY_PART
from hagd.transcoders.dictionary import Codes
from hagd.transcoders.initialise import initialise
from hagd.transcoders.joint import JointTraining
from hagd.transcoders.objective import StackedTranscoders
from hagd.transcoders.sparse.support import Support

_SUMS = ("loss", "prediction", "sparsity")
"""Terms of a step that are sums over layers; `BY_PART` is one layer's, and the others are means."""


def own_layers(n_layers: int, rank: int, world: int) -> range:
    """Consecutive layers of a process; their numbers differ by one at most."""
    return range(rank * n_layers // world, (rank + 1) * n_layers // world)


class DividedTraining(JointTraining):
    """`TranscoderTraining` of this process's layers alone."""

    def configure_model(self) -> None:
        """Build the own layers on the CPU, where their random numbers are drawn; Lightning moves them afterwards, but
        makes its device the default one meanwhile.

        Raises:
            ConfigError: there are more processes than layers.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        if world > len(self.x_mean):
            raise ConfigError(
                f"trainer.strategy=layers: expected at most one process a layer, found {world} processes for "
                f"{len(self.x_mean)} layers; lower trainer.devices, or choose trainer.strategy=ddp"
            )
        own = own_layers(len(self.x_mean), rank, world)
        heads = self._config.lambda_prediction > 0
        with torch.device("cpu"):
            self.stacked = self.stack(
                own=own,
                previous=FromProcess(rank - 1) if heads and rank > 0 else None,
                following=ToProcess(rank + 1) if heads and rank + 1 < world else None,
            )
            initialise(self.stacked, *self.start_tokens(own))

    def of_all_processes(self, values: dict[str, float]) -> dict[str, float]:
        """Metrics of all layers from those of the own ones (`hagd.training.progress.JOIN`)."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, (len(self.stacked.own), values))
        whole: dict[str, float] = {}
        for n_layers, part in found:
            for name, value in part.items():
                share = 1 if name in _SUMS or name.startswith(BY_PART) else n_layers / len(self.x_mean)
                whole[name] = whole.get(name, 0.0) + share * value
        return whole

    @torch.no_grad()
    def whole(self) -> StackedTranscoders:
        """The stack of all layers on the CPU, in every process."""
        mine = {name: value.cpu() for name, value in self.stacked.state_dict().items()}
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, mine)
        state = {name: value for part in parts for name, value in part.items()}
        stacked = dict(self.stacked.named_buffers(recurse=False))
        state |= {name: torch.cat([part[name] for part in parts]) for name in stacked}
        whole = self.stack()
        whole.load_state_dict(state)
        return whole


class ToProcess:
    """Sends the features of the last own layer to a process (`Following`)."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, codes: Codes, written: Tensor) -> Tensor:
        support = codes.support
        for part in (torch.tensor([len(support.index)], device=written.device), support.index, support.offsets):
            dist.send(part, self._rank)
        sent: Tensor = _Send.apply(codes.values, written, self._rank)  # type: ignore[no-untyped-call]
        return sent


class FromProcess:
    """Receives the features of the layer before the first own one from a process (`Previous`)."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def __call__(self, codes: Codes, written: Tensor) -> tuple[Codes, Tensor]:
        support = codes.support
        n = self._received(torch.zeros(1, dtype=torch.int64, device=written.device))
        index = self._received(support.index.new_empty(int(n)))
        offsets = self._received(torch.empty_like(support.offsets))
        # Only an input that needs a gradient makes autograd call the derivative.
        asks = torch.zeros((), device=written.device, requires_grad=True)
        values, before = _Receive.apply(asks, len(index), written, self._rank)  # type: ignore[no-untyped-call]
        return Codes(Support(index, offsets, support.m), values, codes.l0.detach()), before

    def _received(self, into: Tensor) -> Tensor:
        dist.recv(into, self._rank)
        return into


class _Send(torch.autograd.Function):
    """Zero; forward hands two tensors on, backward waits for their derivatives."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, written: Tensor, rank: int) -> Tensor:
        ctx.save_for_backward(values, written)
        ctx.rank = rank
        for part in (values, written):
            dist.send(part.contiguous(), rank)
        return written.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        found = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in ctx.saved_tensors]
        for part in found:
            dist.recv(part, ctx.rank)
        return found[0], found[1], None


class _Receive(torch.autograd.Function):
    """Two tensors from another process; backward returns their derivatives to it."""

    @staticmethod
    def forward(ctx: Any, asks: Tensor, n: int, like: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        ctx.rank = rank
        values, written = like.new_empty(n), torch.empty_like(like, memory_format=torch.contiguous_format)
        for part in (values, written):
            dist.recv(part, rank)
        return values, written

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        for part in gradients:
            dist.send(part.contiguous(), ctx.rank)
        return None, None, None, None
