"""Stages for which there is not enough memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from hagd.errors import OutOfMemoryError
from hagd.pipeline.out_of_memory import explained_when_out_of_memory
from hagd.pipeline.pipeline import Pipeline
from tests.builders import tiny_extract

HUGE = 2**50


def on_a_device() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.\nmore about it")


@pytest.mark.parametrize("asks", [lambda: torch.empty(HUGE), lambda: np.empty(HUGE), on_a_device])
def test_an_allocation_that_fails_names_the_keys(asks: Callable[[], object]) -> None:
    with (
        pytest.raises(
            OutOfMemoryError, match=r"^validation: .*(?i:allocate).*; lower validation\.batch_size, or"
        ) as it,
        explained_when_out_of_memory("validation"),
    ):
        asks()
    assert "more about it" not in str(it.value)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape") as it, explained_when_out_of_memory("graph"):
        torch.zeros(2).view(3)
    assert not isinstance(it.value, OutOfMemoryError)


def test_a_dictionary_that_no_machine_holds(tiny_runs: Path) -> None:
    pipeline = Pipeline(tiny_extract(tiny_runs, transcoder__expansion=HUGE // 100), Console(quiet=True))
    with pytest.raises(OutOfMemoryError, match=r"^transcoders: .*; lower transcoder\.batch_size, "):
        pipeline.get("transcoders")
