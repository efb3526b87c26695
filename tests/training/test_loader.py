from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from hagd.training.loader import StepLoader, batch_indices


@given(n=st.integers(1, 40), batch=st.integers(1, 100), seed=st.integers(0, 5))
def test_batches_use_every_item_equally_often(n: int, batch: int, seed: int) -> None:
    drawn = torch.cat([batch_indices(n, batch, seed, step) for step in range(n)])
    assert torch.equal(drawn.bincount(minlength=n), torch.full((n,), batch))


def test_batches_depend_on_seed_and_step_alone() -> None:
    late = batch_indices(1000, 16, 3, 500)
    assert not torch.equal(late, batch_indices(1000, 16, 3, 501))
    assert not torch.equal(late, batch_indices(1000, 16, 4, 500))
    assert torch.equal(late, batch_indices(1000, 16, 3, 500))


def test_loader_continues_after_the_last_batch_before_the_save() -> None:
    loader = StepLoader(lambda step: step * 10, 6)
    iterator = iter(loader)
    assert [next(iterator) for _ in range(4)] == [0, 10, 20, 30]
    resumed = StepLoader(lambda step: step * 10, 6)
    resumed.load_state_dict(loader.state_dict())
    assert list(resumed) == [40, 50]
    assert list(resumed) == [0, 10, 20, 30, 40, 50]
    assert len(resumed) == 6
