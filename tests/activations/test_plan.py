from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hagd.activations.plan import Sequences, Shard, plan_shards
from hagd.models.language_model import TOKENS_A_PASS, rows_a_pass


def sources(sizes: list[tuple[int, int]], seed: int) -> list[Sequences]:
    """One source of each (N, T), some positions padding, some sequences empty; the last one without padding."""
    g = torch.Generator().manual_seed(seed)
    padded = [Sequences(torch.zeros(n, t).long(), torch.rand(n, t, generator=g) < 0.6) for n, t in sizes]
    return [*padded, Sequences(torch.zeros(3, 5).long())]


def members(shards: tuple[Shard, ...]) -> list[tuple[int, int]]:
    return [(part.source, row) for shard in shards for part in shard.parts for row in part.rows.tolist()]


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), max_size=3),
    buffer_tokens=st.integers(1, 120),
    part_tokens=st.integers(1, 3 * TOKENS_A_PASS),
    seed=st.integers(0, 5),
)
def test_the_plan_divides_the_tokens(
    sizes: list[tuple[int, int]], buffer_tokens: int, part_tokens: int, seed: int
) -> None:
    given_sources = sources(sizes, seed)
    shards = plan_shards(given_sources, buffer_tokens, part_tokens, seed)
    kept = [source.kept() for source in given_sources]
    assert sorted(members(shards)) == [(s, row) for s, count in enumerate(kept) for row in np.flatnonzero(count)]
    longest = max(int(count.max()) for count in kept)
    for shard in shards:
        assert 0 < shard.n_tokens < buffer_tokens + longest
        position = 0
        for part in shard.parts:
            assert part.first == position and part.n_tokens == kept[part.source][part.rows].sum()
            assert (np.diff(part.rows) > 0).all()
            length = given_sources[part.source].tokens.shape[1]
            assert len(part.rows) * length <= max(part_tokens, TOKENS_A_PASS), "one pass, where more are too many"
            position += part.n_tokens
        for source, count in zip(given_sources, range(len(given_sources)), strict=True):
            own = [len(part.rows) for part in shard.parts if part.source == count]
            assert all(rows % rows_a_pass(source.tokens.shape[1]) == 0 for rows in own[:-1]), "whole forward passes"


def test_shards_are_of_nearly_equal_size_and_of_everything() -> None:
    given_sources = sources([(4000, 4), (500, 32)], seed=0)
    shards = plan_shards(given_sources, 4000, 10**6, seed=0)
    sizes = [shard.n_tokens for shard in shards]
    assert len(sizes) == 5 and max(sizes) - min(sizes) < 64
    for shard in shards:
        shares = [sum(part.n_tokens for part in shard.parts if part.source == s) / shard.n_tokens for s in (0, 1)]
        assert all(abs(share - 0.5) < 0.06 for share in shares)


def test_the_seed_decides_what_comes_together() -> None:
    given_sources = sources([(60, 4)], seed=0)
    first, again, other = (members(plan_shards(given_sources, 40, 10**6, seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_rows_are_read_as_they_were_written() -> None:
    tokens = torch.from_numpy(np.arange(12, dtype=np.uint16).reshape(4, 3))
    taken, keep = Sequences(tokens).take(np.array([1, 3]))
    assert taken.tolist() == [[3, 4, 5], [9, 10, 11]] and taken.dtype == torch.int64 and bool(keep.all())
    _, keep = Sequences(tokens, tokens.long() % 2 == 0).take(np.array([1]))
    assert keep.tolist() == [[False, True, False]]
