from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from hagd.activations.draws import Span, following, shard_order, spans, tokens_of

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=4)


def slow(sizes: list[int], seed: int, n: int) -> list[tuple[int, int, int]]:
    """Shard, epoch and place of the first n draws, one by one."""
    drawn: list[tuple[int, int, int]] = []
    epoch = 0
    while len(drawn) < n:
        drawn += [(shard, epoch, i) for shard in shard_order(len(sizes), seed, epoch) for i in range(sizes[shard])]
        epoch += 1
    return drawn[:n]


def places(found: list[Span]) -> list[tuple[int, int, int]]:
    return [(span.shard, span.epoch, span.first + i) for span in found for i in range(span.count)]


@given(SIZES, st.integers(0, 3), st.integers(0, 60), st.integers(0, 40))
def test_spans_are_pieces_of_one_sequence(sizes: list[int], seed: int, first: int, count: int) -> None:
    found = spans(sizes, seed, first, count)
    assert places(found) == slow(sizes, seed, first + count)[first:]
    assert all(span.count > 0 for span in found)


@given(SIZES, st.integers(0, 3))
def test_each_token_is_drawn_once_an_epoch(sizes: list[int], seed: int) -> None:
    for epoch in range(3):
        drawn = Counter(
            (span.shard, int(token))
            for span in spans(sizes, seed, epoch * sum(sizes), sum(sizes))
            for token in tokens_of(span, np.arange(sizes[span.shard]), sizes[span.shard], seed)
        )
        assert drawn == Counter((shard, token) for shard, size in enumerate(sizes) for token in range(size))


@given(st.integers(1, 30), st.data())
def test_outliers_are_replaced_evenly(size: int, data: st.DataObject) -> None:
    ordinary = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
    drawn = Counter(tokens_of(Span(0, 0, 0, size), ordinary, size, seed=0).tolist())
    assert set(drawn) <= set(ordinary.tolist()) and sum(drawn.values()) == size
    assert {drawn[token] for token in ordinary.tolist()} <= {size // len(ordinary), -(-size // len(ordinary))}


def test_orders_differ_between_epochs_shards_and_seeds() -> None:
    def draw(seed: int, epoch: int, shard: int) -> list[int]:
        return tokens_of(Span(shard, epoch, 0, 50), np.arange(50), 50, seed).tolist()

    drawn = [draw(0, 0, 0), draw(1, 0, 0), draw(0, 1, 0), draw(0, 0, 1)]
    assert all(a != b for i, a in enumerate(drawn) for b in drawn[:i])
    assert len({tuple(shard_order(9, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_shard_that_comes_next_is_known() -> None:
    sizes = [2, 3, 1]
    order = list(dict.fromkeys((shard, epoch) for shard, epoch, _ in slow(sizes, 7, 4 * sum(sizes))))
    for (shard, epoch), (after, _) in pairwise(order):
        assert following(3, 7, Span(shard, epoch, 0, 1)) == after
