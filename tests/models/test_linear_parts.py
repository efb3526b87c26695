"""Matrices of a model that is spread over devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hagd.models.linear_parts import rotation
from tests.builders import random_model


class Elsewhere(Tensor):
    """As on another device: meets tensors of its own kind only, and those that tell `to` where it shall go."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        others = [each for each in args if isinstance(each, Tensor) and not isinstance(each, cls)]
        assert func is Tensor.to or not others, "two devices in one operation"
        found = super().__torch_function__(func, types, args, kwargs)
        return found.as_subclass(Tensor) if others else found


@pytest.mark.parametrize("architecture", ["gpt_neox", "llama"])
def test_angles_may_come_from_another_device(architecture: Any) -> None:
    lm = random_model(architecture)
    expected = rotation(lm, 2, torch.float32)

    def elsewhere(_: nn.Module, __: tuple[Any, ...], angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(each.as_subclass(Elsewhere) for each in angles)

    assert lm.adapter.rotary is not None
    lm.model.get_submodule(lm.adapter.rotary).register_forward_hook(elsewhere)
    found = rotation(lm, 2, torch.float32)
    assert torch.equal(found, expected) and type(found) is Tensor
